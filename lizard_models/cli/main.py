"""``lizard-attn``: one module a command."""

from __future__ import annotations

import signal

import typer

from lizard_models.cli import (
    convert,
    demo,
    evaluate,
    generate,
    info,
    layers,
    linearize,
    recipe,
    report,
    run,
    serve,
    with_module,
)
from lizard_models.cli.errors import Command

app = typer.Typer(
    help="Turn a pretrained Llama, Mistral, Qwen or Gemma into a model that reads any length in constant memory.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


@app.callback()
def quiet() -> None:
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()  # ours show what matters
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


app.command("linearize", cls=Command)(linearize.command)
app.command("run", cls=Command)(run.command)
app.add_typer(recipe.app, name="recipe")
app.command("report", cls=Command)(report.command)
app.command("convert", cls=Command)(convert.command)
app.command("generate", cls=Command)(generate.command)
app.command("eval", cls=Command)(evaluate.command)
app.command("demo", cls=Command)(demo.command)
app.command("info", cls=Command)(info.command)
app.command("layers", cls=Command)(layers.command)
app.command("serve", cls=Command, context_settings=with_module.PASS_ON)(serve.command)
app.command("with", cls=Command, context_settings=with_module.PASS_ON)(with_module.command)


def main() -> None:
    """Entry point of the console script. Ctrl-C while Python ends is no error: there is nothing left to stop."""
    try:
        app()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
