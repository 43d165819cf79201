"""Measured training steps beside what is counted of them: memory by ``lizard_models.runs.cost``, time by FLOP.

    python benchmarks/gpu/beside_floor.py benchmarks/results/training/NAME.json

reads what ``train_step.py`` wrote, and needs no GPU. The counted memory is what ``--dry-run`` shows: weights, trained
numbers with gradient and moments, activations that a backward needs. The floor of time is the FLOP of a step over the
989 TFLOP/s of an H100's or H200's tensor cores. "80 GB": whether a card of 80 GB (74.5 GiB) holds the measured peak.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from train_step import PEAK, PRESET, SHAPES
from transformers import LlamaConfig

from lizard_models import LizardConfig
from lizard_models.runs.cost import run_cost

CARD = 80e9  # bytes
HEAD = (
    "stage",
    "rows x tokens",
    "kind",
    "GiB at most",
    "counted GiB",
    "80 GB",
    "tokens/s",
    "by count at most",
    "share",
)


@functools.cache
def counted(shape: str, layers: int | None, stage: str, batch: int, length: int, checkpointing: bool) -> int:
    """Bytes of a step at its fullest moment, as the estimate of a run has them."""
    size: dict[str, Any] = {"sequence_length": length, "batch_size": batch}
    weights = {"cross_entropy_weight": 1.0, "kl_weight": 0.0} if stage == "stage 2 CE" else {}
    lizard = LizardConfig.preset(PRESET).replace(stage1=size, stage2=size | weights)
    values = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    cost = run_cost(LlamaConfig(**values), lizard, checkpointing=checkpointing)
    return (cost.stage1 if stage == "stage 1" else cost.stage2).bytes


def table(report: dict[str, Any]) -> str:
    """Markdown, a line for each row of a Lizard's stages."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    given = report["arguments"]
    layers = given.get("layers")
    for row in report["rows"]:
        stage, batch, length, kind = (row[name] for name in ("stage", "batch", "length", "kind"))
        if stage.startswith("teacher"):
            continue
        size = counted(given["shape"], layers and int(layers), stage, batch, length, kind == "checkpoint")
        cells = [stage, f"{batch} x {length:,}", kind]
        if "failed" in row:
            cells += [row["failed"].strip().splitlines()[-1], f"{size / 2**30:.1f}", *[""] * 4]
            lines.append("| " + " | ".join(cells) + " |")
            continue
        most = batch * length * PEAK / row["flops"]
        measured = [f"{row['peak_gib']:.1f}", f"{size / 2**30:.1f}", "yes" if row["peak_gib"] * 2**30 < CARD else "no"]
        speed = [f"{row['tokens_per_second']:,.0f}", f"{most:,.0f}", f"{row['tokens_per_second'] / most:.0%}"]
        lines.append("| " + " | ".join([*cells, *measured, *speed]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    print(table(json.loads(parser.parse_args().file.read_text())))
