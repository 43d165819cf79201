"""``lizard-attn serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a linearized model; also the name that clients ask for.")],
) -> None:
    """Serve a model to OpenAI clients with transformers' own server, which is told of the Lizard families.

    Other options are the server's, as transformers serve --help shows them: --host, --port, --device, --dtype,
    --compile. It needs pip install 'lizard-attn[serve]'.

    [bold]Examples[/bold]

    [cyan]lizard-attn serve my-lizard[/cyan]

    To other machines, from the second GPU: [cyan]lizard-attn serve my-lizard --host 0.0.0.0 --device cuda:1[/cyan]

    A conversation with it, in another window: [cyan]transformers chat my-lizard http://localhost:8000/v1[/cyan]
    """
    with one_line_errors():
        check(model)

        from lizard_models.cli.with_module import name_classes

        name_classes()

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
