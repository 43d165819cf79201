"""What stage 0 ends with, in one file: scores as they came out, and how well they fit.

A checkpoint holds scores in the units they trained in, and the way back from there is measured on a few rows anew. On
a GPU that gives other last bits, by which the stages after it would know another model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lizard_models.distill import parallel
from lizard_models.files.weights import content_digest

SCORES = "scores.safetensors"


def save_scores(folder: Path, scores: nn.ModuleList, r2: list[list[float]]) -> None:
    """Writes trained scores and their R2 into a stage's folder, whole or not at all; every process must call it."""
    if parallel.is_main_process():
        tensors = {name: p.detach().cpu().contiguous() for name, p in scores.named_parameters()}
        told = {"r2": json.dumps(r2)}
        draft = folder / f".{SCORES}"
        save_file(tensors, draft, metadata=told | {"digest": content_digest(tensors, told)})
        os.replace(draft, folder / SCORES)
    parallel.wait_for_all()


@torch.no_grad()
def load_scores(folder: Path, scores: nn.ModuleList) -> list[list[float]]:
    """Writes the scores of a finished stage into ``scores``, and returns their R2.

    Raises ValueError for a file that is damaged, or of scores of other names or shapes.
    """
    path = folder / SCORES
    remedy = "delete it, and resume measures them again from the last checkpoint"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            told = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error
    if told.pop("digest", None) != content_digest(tensors, told):
        raise ValueError(f"{path} is damaged: {remedy}")
    present = dict(scores.named_parameters())
    if {name: p.shape for name, p in present.items()} != {name: t.shape for name, t in tensors.items()}:
        raise ValueError(f"{path} is of scores of another model: {remedy}")
    for name, value in tensors.items():
        present[name].copy_(value)
    return json.loads(told["r2"])
