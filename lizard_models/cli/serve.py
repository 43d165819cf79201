"""``lizard-attn serve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lizard_models.cli.errors import one_line_errors

if TYPE_CHECKING:
    from lizard_models.model.prefix import PrefixStates


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a linearized model; also the name that clients ask for.")],
    prefix_memory: Annotated[
        float, typer.Option(help="GiB of memory for what was read, so that a next turn reads what is new; 0 for none.")
    ] = 1.0,
    prefix_folder: Annotated[
        Path | None, typer.Option(help="Folder that keeps it too, for other servers and after a restart.")
    ] = None,
    prefix_disk: Annotated[float, typer.Option(help="GiB that the folder may hold.")] = 10.0,
) -> None:
    """Serve a model to OpenAI clients with transformers' own server, which is told of the Lizard families.

    Other options are the server's, as transformers serve --help shows them: --host, --port, --device, --dtype,
    --compile. It needs pip install 'lizard-attn[serve]'.

    [bold]Examples[/bold]

    [cyan]lizard-attn serve my-lizard[/cyan]

    With what was read kept on disk: [cyan]lizard-attn serve my-lizard --prefix-memory 4 --prefix-folder states[/cyan]

    To other machines, from the second GPU: [cyan]lizard-attn serve my-lizard --host 0.0.0.0 --device cuda:1[/cyan]

    A conversation with it, in another window: [cyan]transformers chat my-lizard http://localhost:8000/v1[/cyan]
    """
    with one_line_errors():
        check(model)

        from lizard_models.cli.with_module import name_classes
        from lizard_models.model.prefix import PrefixStates

        name_classes()
        if prefix_memory or prefix_folder is not None:
            sizes = {"max_bytes": int(prefix_memory * 2**30), "max_disk_bytes": int(prefix_disk * 2**30)}
            keep_states(PrefixStates(folder=prefix_folder, **sizes))

    from transformers.cli.transformers import app

    app(["serve", model, *context.args], prog_name="transformers")


def check(model: str) -> None:
    """Raises ValueError where there is nothing to serve, or nothing to serve it with."""
    from transformers import AutoConfig
    from transformers.utils.import_utils import is_serve_available

    import lizard_models  # noqa: F401  registers the families

    if not is_serve_available():
        raise ValueError(
            "transformers' server wants fastapi, uvicorn, pydantic and openai: pip install 'lizard-attn[serve]'"
        )
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {model!r} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if getattr(config, "lizard", None) is None:
        raise ValueError(
            f"model {model!r} is a {config.model_type!r} model and not linearized: transformers serve serves it, or "
            f"make a Lizard of it with lizard-attn linearize {model}"
        )


def keep_states(store: PrefixStates) -> None:
    """Give every model that transformers' server loads from now on this store, and say what each text takes from it."""
    import logging

    from transformers.cli.serving import model_manager

    logger = logging.getLogger("lizard_models.model.prefix")
    logger.setLevel(logging.INFO)  # as uvicorn's lines
    logger.addHandler(logging.StreamHandler())

    class Manager(model_manager.ModelManager):
        def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
            loaded: Any = super().load_model_and_processor(*args, **kwargs)
            if hasattr(loaded[0], "prefix_states"):
                loaded[0].prefix_states = store
            return loaded

    model_manager.ModelManager = Manager  # type: ignore[misc]
