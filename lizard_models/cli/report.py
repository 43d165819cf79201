"""``lizard-attn report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors


def command(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished model, or of a run that goes on or stopped.")],
) -> None:
    """Write a run's report again: run.md with plots of losses, rates, speed, memory, gates and errors.

    A run writes it when it ends or stops; one that was killed, or is still running, has its log.jsonl.

    [bold]Examples[/bold]

    [cyan]lizard-attn report my-lizard[/cyan]

    While it runs: [cyan]lizard-attn report my-lizard.training[/cyan]
    """
    with one_line_errors():
        from lizard_models.files import streams
        from lizard_models.runs.run_report import write_run_report

        console = streams.console()
        for path in write_run_report(folder, console.print):
            console.print(f"written: {path}", highlight=False, markup=False, soft_wrap=True)
