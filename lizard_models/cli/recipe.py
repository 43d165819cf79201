"""``lizard-attn recipe``: show and validate recipe files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lizard_models.cli.errors import Command, one_line_errors

app = typer.Typer(
    help="Recipe files, which lizard-attn run carries out.", no_args_is_help=True, rich_markup_mode="rich"
)


@app.command("show", cls=Command)
def show(
    preset: Annotated[
        str, typer.Argument(help="paper, paper_literal, plain, recommended, lolcats, liger or window_only.")
    ] = "recommended",
) -> None:
    """Print a preset as a complete recipe file, with a comment on every key.

    [bold]Examples[/bold]

    [cyan]lizard-attn recipe show recommended > recipe.yaml[/cyan]
    """
    with one_line_errors():
        from lizard_models.runs.recipe_show import preset_recipe

        typer.echo(preset_recipe(preset), nl=False)


@app.command("validate", cls=Command)
def validate(recipe: Annotated[Path, typer.Argument(help="A recipe file.")]) -> None:
    """Check a recipe file: a line for every mistake, with file, line and key, and exit code 2.

    Only the file is looked at; that teacher, text and memory are there, the run checks before its first step.

    [bold]Examples[/bold]

    [cyan]lizard-attn recipe validate recipe.yaml[/cyan]
    """
    with one_line_errors():
        from lizard_models.runs.plan import asked_stages
        from lizard_models.runs.recipe_file import RecipeError, read_recipe

        try:
            plan = read_recipe(recipe)
        except RecipeError as error:
            for fault in error.faults:
                typer.echo(f"error: {fault}", err=True)
            raise typer.Exit(2) from None
        stages = asked_stages(plan)
        typer.echo(
            f"valid: {plan.teacher} with preset {plan.config.name}, {', '.join(stages) or 'no stage'}, to {plan.out}"
        )
