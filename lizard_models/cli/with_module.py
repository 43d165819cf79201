"""``lizard-attn with``."""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def command(
    context: typer.Context,
    module: Annotated[str, typer.Argument(help="Python module of the tool, as after python -m.")],
) -> None:
    """Run another Python tool with the Lizard models registered, as python -m would.

    Tools that load models through transformers' Auto classes then know a saved Lizard, without trust_remote_code.

    [bold]Examples[/bold]

    lm-eval's own command and its hf model: [cyan]lizard-attn with lm_eval run --model hf
    --model_args pretrained=my-lizard --tasks piqa,arc_easy[/cyan]

    A script that knows nothing of lizard-attn: [cyan]lizard-attn with my_package.serve --model my-lizard[/cyan]

    transformers' own command: [cyan]lizard-attn with transformers serve my-lizard[/cyan]
    """
    with one_line_errors():
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            raise ValueError(f"module {module!r} is not installed here: pip install it beside lizard-attn")
        import lizard_models  # noqa: F401  registers the families

    if module == "transformers":
        module = "transformers.cli.transformers"  # the package cannot be run, its command can
    if module.startswith("transformers.cli"):
        name_classes()
    sys.argv = [module, *context.args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def name_classes() -> None:
    """Put the Lizard classes where transformers' server looks a model's class up: by name, in the module it holds."""
    from lizard_models.model.families import FAMILIES, load_family

    manager = importlib.import_module("transformers.cli.serving.model_manager")
    for family in FAMILIES:
        model = load_family(family)
        setattr(manager.transformers, model.__name__, model)
