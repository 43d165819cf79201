"""Scores of kept keys that rows share: what their stage 0 depends on, and where a finished one is."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock  # the Hugging Face hub's client brings it

from benchmarks.quality.records import Record
from lizard_models.distill.score_files import SCORES, load_scores
from lizard_models.files.folders import appear_whole
from lizard_models.files.weights import content_digest
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


def score_sum(model: LizardCausalLM) -> str:
    """sha256 of every score of a model."""
    return content_digest(dict(model.key_scores().named_parameters()), {})


def marks(folder: Path, model: LizardCausalLM) -> dict[str, str]:
    """What a record says of the stage 0 it used: ``of``, all that this depends on, and the sum of its scores."""
    return {"of": folder.name, "sum": score_sum(model)}


def take(folder: Path, model: LizardCausalLM) -> dict[str, Any] | None:
    """Puts the scores of a folder into a model; what its stage 0 told, None if there is none.

    Raises ValueError for scores that another stage 0 left, or another than it told of.
    """
    if not (folder / TOLD).is_file():
        return None
    load_scores(folder, model.key_scores())
    told, found = json.loads((folder / TOLD).read_text()), marks(folder, model)
    if strange := [name for name, value in found.items() if told.get(name, value) != value]:
        raise ValueError(
            f"{folder}: its scores are not those of the stage 0 that belongs here ({', '.join(strange)} differ); "
            "delete it, and the row fits its own"
        )
    return told | found


def give(folder: Path, stage: Path, told: dict[str, Any]) -> None:
    """Puts the scores of a finished stage 0 where other rows find them, whole."""
    if folder.is_dir():
        return
    with appear_whole(folder) as draft:
        shutil.copyfile(stage / SCORES, draft / SCORES)
        (draft / TOLD).write_text(json.dumps(told))


def strays(records: Mapping[str, Record]) -> list[str]:
    """What is wrong with the scores of recorded rows with kept keys, by their records alone: [] for nothing.

    A row fits its own scores or has those of a row that is recorded too, whose stage 0 is the same: teacher, data,
    recipe, and what scores read. Both tell the same of it, and a row ends with the scores it began with: no stage after
    it moves them. Records from before there were sums have none to compare.
    """
    wrong = []
    for stem, record in records.items():
        stage0 = record["stages"].get("stage0")
        if stage0 is None:
            if _wants_scores(record):
                wrong.append(f"{stem}: has no stage 0, and its budget has one")
            continue
        whose = stage0.get("row", stem)
        first = records.get(whose)
        if first is None:
            wrong.append(f"{stem}: its scores are those of {whose}, which is not recorded")
        elif _depends(record) != _depends(first):
            wrong.append(f"{stem}: its scores are those of {whose}, whose stage 0 is another")
        elif any(first["stages"]["stage0"].get(name, stage0.get(name)) != stage0.get(name) for name in ("r2", "sum")):
            wrong.append(f"{stem}: its scores are those of {whose}, which has been fitted anew since")
        shared = record["settings"]["config"]["stage0"].get(
            "share_places"
        )  # a layer may lose its score with its places
        if not shared and record.get("scores", stage0.get("sum")) != stage0.get("sum"):
            wrong.append(f"{stem}: ends with other scores than its stage 0 did")
    return wrong


def _wants_scores(record: Record) -> bool:
    settings = record["settings"]
    keeps = settings.get("config", {}).get("attention", {}).get("kept_keys")
    trained = record["stages"] and settings["budget"].get("stage0_steps")
    return bool(keeps and trained and not settings["row"].get("oracle"))


def _depends(record: Record) -> Any:
    """What a record says of what its stage 0 depends on."""
    settings = record["settings"]
    config = settings["config"]
    read = {name: config["attention"].get(name) for name in READ}
    wide = (config.get("wide_layers"), config.get("wide_window")) if config.get("wide_layers") else None
    softmax, hashed = config.get("softmax_layers"), record["hashes"].get("stage0")
    recipe = {name: value for name, value in config["stage0"].items() if name != "share_places"}  # which comes after
    return settings["teacher"], settings["budget"]["stage0_steps"], recipe, read, wide, softmax, hashed
