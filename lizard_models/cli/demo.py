"""``lizard-attn demo``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import Cache, check_folder


def command(
    out: Annotated[Path, typer.Option(help="Folder for the model, the table and the plot.")] = Path("lizard-demo"),
    minutes: Annotated[
        float, typer.Option(help="Time for the whole demo, which sets the steps; more gives a better student.", min=1.0)
    ] = 8.5,
    cache: Cache = None,
) -> None:
    """Linearize a real SmolLM2-135M-Instruct on this machine: under ten minutes and 6 GB on two CPU cores.

    It fetches teacher and text, trains both stages, and shows loss by position, a passkey test and a continuation
    beside the teacher's. Stopped, it goes on where it was; finished, it shows the result again.

    [bold]Examples[/bold]

    [cyan]lizard-attn demo[/cyan]

    With more training: [cyan]lizard-attn demo --minutes 30 --out longer-demo[/cyan]
    """
    with one_line_errors(lambda: shlex.join(["lizard-attn", *sys.argv[1:]])):
        from lizard_models.files.streams import console
        from lizard_models.runs.demo import demo

        check_folder(out)
        demo(out, minutes=minutes, cache=cache, console=console())
