"""The commands that show what is recorded, and train nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.quality.options import RESULTS, BudgetName, Out, read_budget
from lizard_models.cli.errors import one_line_errors


def docs(
    page: Annotated[Path, typer.Option(help="Page of tables to write, whole.")] = Path("benchmarks/results/TABLES.md"),
    figures: Annotated[Path, typer.Option(help="Folder of its plots.")] = Path("docs/figures"),
    out: Out = RESULTS,
) -> None:
    """Write benchmarks/results/TABLES.md and its plots from the records of the rows.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality docs[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        if not out.is_dir():
            raise ValueError(f"--out {str(out)!r} is not there; run from the repository, or give another")
        try:
            from benchmarks.quality.report import write_docs

            write_docs(page, figures, out)
        except ImportError as error:
            raise ValueError("docs: plots need matplotlib; pip install 'lizard-attn[demo]'") from error
        Console(soft_wrap=True).print(f"written: {page}")


def paper(
    page: Annotated[Path, typer.Option(help="Page of tables to write, whole.")] = Path("benchmarks/results/PAPER.md"),
    results_page: Annotated[
        Path, typer.Option(help="Page whose first table is written, between its two marks.")
    ] = Path("docs/results.md"),
    out: Out = RESULTS,
) -> None:
    """Write the paper's Tables 1, 4, 7 and 10 in its form, ours beside theirs, from the records in OUT/TEACHER/.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality paper[/cyan]
    """
    with one_line_errors():
        from benchmarks.quality.paper_tables import write_paper

        if not out.is_dir():
            raise ValueError(f"--out {str(out)!r} is not there; run from the repository, or give another")
        write_paper(page, results_page, out)
        typer.echo(f"written: {page}, {results_page}")


def curve(
    budget: BudgetName = "quick",
    path: Annotated[
        Path | None, typer.Option(help="SVG to write. Default: docs/figures/quality-BUDGET-curve.svg.")
    ] = None,
    out: Out = RESULTS,
) -> None:
    """Draw what memory buys: loss, KL and passkeys against the bytes of a sequence, for each way to spend them.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality curve --budget full[/cyan]
    """
    with one_line_errors():
        from benchmarks.quality.results import Results

        name = read_budget(budget).name
        target = path or Path(f"docs/figures/quality-{name}-curve.svg")
        try:
            from benchmarks.quality.curve import write_curve
        except ImportError as error:
            raise ValueError("curve: plots need matplotlib; pip install 'lizard-attn[demo]'") from error
        if not write_curve(Results(out / f"{name}.jsonl"), target):
            raise ValueError(f"curve: rows of the budget {name} in {str(out)!r} spend their bytes in one way alone")
        typer.echo(f"written: {target}")


def show_goals(
    row: Annotated[
        str | None, typer.Option(help="Row of the table kept. Default: that which loses least in at most 40 MiB.")
    ] = None,
    small: Annotated[str | None, typer.Option(help="Another, for the goal of at most 20 MiB.")] = None,
    budget: BudgetName = "full",
    out: Out = RESULTS,
) -> None:
    """Hold rows with kept keys against the goals for exact recall: met, missed or not measured.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality goals --budget full[/cyan]
    """
    with one_line_errors():
        from benchmarks.quality.recall_goals import goals_table, recall_goals
        from benchmarks.quality.results import Results
        from benchmarks.quality.rows import ROWS

        for option, name in (("--row", row), ("--small", small)):
            if name is not None and name not in ROWS:
                raise ValueError(f"{option} is {name!r}, which is no row; see `python -m benchmarks.quality list`")
        results = Results(out / f"{read_budget(budget).name}.jsonl")
        typer.echo(goals_table(recall_goals(results, out / "mqar.jsonl", row or "", small or "")))


def list_rows() -> None:
    """Show the tables and the rows in them."""
    with one_line_errors():
        from rich.console import Console

        from benchmarks.quality.rows import TABLES, rows_of

        console = Console(soft_wrap=True)
        for table in TABLES.values():
            console.print(f"[bold]{table.name}[/bold]: {table.about}", highlight=False)
            for row in rows_of(table.name):
                console.print(f"  {row.name}: {row.about}", highlight=False, markup=False)


COMMANDS: dict[str, Callable[..., None]] = {
    "docs": docs,
    "paper": paper,
    "curve": curve,
    "goals": show_goals,
    "list": list_rows,
}
