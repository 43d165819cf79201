"""Scores of kept keys that rows share: what their stage 0 depends on, and where a finished one is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock  # the Hugging Face hub's client brings it

from lizard_models.distill.score_files import SCORES, load_scores
from lizard_models.files.folders import appear_whole
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.runs.score_rows import ScoreRows

TOLD = "stage0.json"
READ = ("window", "anchors", "scale", "softcap", "score_dim", "score_received", "score_stride")


def shared_folder(work: Path, model: LizardCausalLM, rows: ScoreRows, teacher: str) -> Path:
    """Where rows whose stage 0 is the same find its scores: another number of kept keys or another stage 1 changes
    nothing in it, as it sees the teacher alone.

    It depends on the teacher, its rows and recipe, and on which layers have scores of what sizes, windows and inputs.
    """
    layers = [
        {"layer": attention.layer_idx, **{name: getattr(attention.lizard.config, name) for name in READ}}
        for attention in model.lizard_attentions()
        if attention.lizard.key_score is not None
    ]
    held_out = hashlib.sha256(rows.held_out.numpy().tobytes()).hexdigest()
    recipe = dataclasses.asdict(rows.recipe)
    del recipe["share_places"]  # comes after it
    said = [teacher, str(model.dtype), recipe, rows.training.digest, held_out, layers]
    return work / "stage0" / hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[Path]:
    """Yields ``folder`` when no other row fits its scores: a row that would fit the same ones waits for them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        yield folder


def take(folder: Path, model: LizardCausalLM) -> dict[str, Any] | None:
    """Puts the scores of a folder into a model; what its stage 0 told, None if there is none."""
    if not (folder / TOLD).is_file():
        return None
    load_scores(folder, model.key_scores())
    return json.loads((folder / TOLD).read_text())


def give(folder: Path, stage: Path, told: dict[str, Any]) -> None:
    """Puts the scores of a finished stage 0 where other rows find them, whole."""
    if folder.is_dir():
        return
    with appear_whole(folder) as draft:
        shutil.copyfile(stage / SCORES, draft / SCORES)
        (draft / TOLD).write_text(json.dumps(told))
