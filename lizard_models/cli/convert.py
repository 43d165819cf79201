"""``lizard-attn convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import (
    Cache,
    DType,
    KeepSliding,
    KeptKeys,
    Settings,
    SoftmaxLayers,
    SoftmaxShare,
    read_dtype,
    read_kept,
    read_kept_keys,
    read_settings,
)


def command(
    teacher: Annotated[str, typer.Argument(help="Hub name, local folder, or smollm2-135m.")],
    out: Annotated[Path, typer.Option(help="Folder for the untrained model; must not exist yet.")],
    preset: Annotated[
        str, typer.Option(help="paper, paper_literal, plain, recommended, lolcats, liger or window_only.")
    ] = "recommended",
    settings: Settings = None,
    kept_keys: KeptKeys = None,
    softmax_layers: SoftmaxLayers = None,
    softmax_share: SoftmaxShare = None,
    keep_sliding: KeepSliding = None,
    dtype: DType = None,
    cache: Cache = None,
) -> None:
    """Write a teacher's untrained Lizard, shard by shard: it need not fit into memory.

    [bold]Examples[/bold]

    [cyan]lizard-attn convert meta-llama/Llama-3.1-8B --out lizard-8b[/cyan]

    Another preset and window: [cyan]lizard-attn convert my-teacher --preset paper --set attention.window=64
    --out my-lizard[/cyan]

    A quarter of the layers kept softmax: [cyan]lizard-attn convert my-teacher --softmax-share 0.25 --out hybrid[/cyan]

    Kept keys, 608 of each key head in preset recommended, are those least like the mean key here: no text is read, by
    which scores could be fitted or places shared out. Fewer, or none of them:
    [cyan]lizard-attn convert my-teacher --kept-keys 256 --out kept[/cyan], [cyan]--preset plain[/cyan]
    """
    with one_line_errors():
        from lizard_models.config import LizardConfig
        from lizard_models.files import streams
        from lizard_models.runs.convert_folder import linearize_folder

        console = streams.console(highlight=False)
        chosen = LizardConfig.preset(preset).replace(**read_settings(settings))
        chosen = chosen.replace(**read_kept(softmax_layers, softmax_share, keep_sliding))
        chosen = chosen.replace(**read_kept_keys(kept_keys))
        folder = linearize_folder(teacher, out, chosen, dtype=read_dtype(dtype), cache=cache, say=console.print)
        console.print(f"saved, untrained: {folder}")
