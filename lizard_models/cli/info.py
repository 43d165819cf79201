"""``lizard-attn info``."""

from __future__ import annotations

from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import (
    Cache,
    KeptKeys,
    Settings,
    merged,
    read_kept_keys,
    read_numbers,
    read_settings,
)


def command(
    model: Annotated[str, typer.Argument(help="Folder of a linearized model, or a teacher by name or folder.")],
    preset: Annotated[
        str | None, typer.Option(help="For a teacher: the preset it would be linearized with; default recommended.")
    ] = None,
    settings: Settings = None,
    kept_keys: KeptKeys = None,
    lengths: Annotated[
        str | None, typer.Option(help="Lengths of sequences in tokens.", show_default="8192,32768,131072")
    ] = None,
    cache: Cache = None,
) -> None:
    """Show what linearizing adds and what it saves: parameters, and memory of a sequence by its length.

    No weights are read, so it works for models that do not fit here.

    [bold]Examples[/bold]

    [cyan]lizard-attn info my-lizard[/cyan]

    Before training anything: [cyan]lizard-attn info meta-llama/Llama-3.2-1B --preset paper[/cyan]

    Up to a million tokens: [cyan]lizard-attn info smollm2-135m --lengths 1024,131072,1048576[/cyan]

    A wider window: [cyan]lizard-attn info smollm2-135m --set attention.window=256[/cyan]

    Fewer kept keys than the preset's 608, or none: [cyan]lizard-attn info smollm2-135m --kept-keys 256[/cyan],
    [cyan]--preset plain[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        from lizard_models.runs.memory import LENGTHS, describe

        console = Console()
        for part in describe(
            model,
            preset=preset,
            changes=merged(read_settings(settings), read_kept_keys(kept_keys)),
            lengths=read_numbers(lengths, "--lengths") or LENGTHS,
            cache=cache,
        ):
            console.print(part)
