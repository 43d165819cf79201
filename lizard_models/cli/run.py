"""``lizard-attn run``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from lizard_models.cli.errors import RUNNING, one_line_errors


def command(
    recipe: Annotated[Path, typer.Argument(help="A recipe file; lizard-attn recipe show prints a complete one.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show shapes, new parameters, and estimates of memory and time.")
    ] = False,
) -> None:
    """Do what is missing of a recipe: all of it, what a stopped run has left, or nothing.

    It is lizard-attn linearize --resume auto with a file in place of options. What was trained and measured before is
    skipped, and a line says so. Paths in a recipe are relative to the folder that the command is started in.

    [bold]Examples[/bold]

    [cyan]lizard-attn run recipe.yaml[/cyan]

    What it would take, without weights: [cyan]lizard-attn run recipe.yaml --dry-run[/cyan]

    On several GPUs, with [bold]training: {fsdp: true}[/bold] in the recipe:
    [cyan]torchrun --nproc-per-node 8 -m lizard_models run recipe.yaml[/cyan]
    """
    with one_line_errors(_again):
        from lizard_models.cli.carry_out import carry_out, describe
        from lizard_models.cli.options import read_device
        from lizard_models.files import streams
        from lizard_models.runs.recipe_file import read_recipe
        from lizard_models.runs.recipe_keys import FROM_PLAN

        plan = read_recipe(recipe)
        # Errors name what the library calls its arguments; here they are keys of the recipe.
        RUNNING.set({field: key for key, field in FROM_PLAN.items()} | {"seq_len": "sequence_length"})
        if dry_run:
            return describe(plan, streams.console())
        plan.device = read_device(plan.device, "training.device")
        try:
            carry_out(plan, streams.console())
        except ValueError as error:
            if "resume=True" not in str(error):
                raise
            said = str(error).removeprefix("resume: ").replace("resume=True", "the recipe that it began with")
            raise ValueError(said) from error


def _again() -> str:
    from lizard_models.distill.parallel import process_count

    return "the same torchrun command" if process_count() > 1 else shlex.join(["lizard-attn", *sys.argv[1:]])
