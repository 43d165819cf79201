"""Which checkpoint a stage goes on from, and whether it is of the same run: recipe, data, model, and whole files."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lizard_models.config import RETIRED
from lizard_models.distill import parallel
from lizard_models.distill.checkpoint_files import damaged, refuse_pickles
from lizard_models.files.folders import sync, write_whole
from lizard_models.files.records import read_json, seal_broken, sealed
from lizard_models.files.weights import content_digest

RUN = "run.json"
NAME = re.compile(r"checkpoint-(\d+)")
SAVING, REPLACED = ".saving-", ".replaced-"  # folders that a stage writes or deletes; nothing of them is read
OF_TRAINING = (
    "version",
    "name",
    "stage0",
    "stage1",
    "stage2",
    "stage3",
)  # what a Lizard's own record holds beside what it computes


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a stage's folder, oldest first; what else is there is nobody's."""
    found = (path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def put_in_place(written: Path, folder: Path) -> None:
    """Moves a checkpoint that is on the disk into a stage's folder, in place of one of its name."""
    target = folder / written.name
    if target.exists():
        remove(target)
    written.rename(target)
    sync(folder)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint, which is gone at once: half of one never has its name."""
    aside = checkpoint.with_name(f"{REPLACED}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes what a process that was killed left in a stage's folder. Nobody else may be working there."""
    for path in (p for start in (SAVING, REPLACED) for p in folder.glob(f"{start}*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{RUN}.*"):
        path.unlink(missing_ok=True)


def older(checkpoint: Path) -> str:
    """What to do about a checkpoint that cannot be used."""
    before = [path for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    if not before:
        return f"there is no older checkpoint: delete {str(checkpoint.parent)!r}, and resume trains this stage anew"
    return f"delete {str(checkpoint)!r}, and resume goes on from {str(before[-1])!r}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def frozen_digest(objective: nn.Module) -> str:
    """What a stage trains against: parameters that do not train, and the model's configuration without recipes."""
    frozen = {name: p for name, p in objective.named_parameters() if not p.requires_grad}
    model = next((m for m in objective.modules() if isinstance(m, PreTrainedModel)), None)
    config: dict[str, Any] = {} if model is None else dict(model.config.to_dict())
    if isinstance(config.get("lizard"), dict):
        config["lizard"] = {key: value for key, value in config["lizard"].items() if key not in OF_TRAINING}
    return content_digest(frozen, config)


def checkpoint_to_resume(folder: Path, resume: bool, record: dict[str, Any]) -> Path | None:
    """The newest checkpoint of a stage's folder, None for a new run, whose record is then written.

    record: recipe, steps, data and model of this run. Raises ValueError for checkpoints where ``resume`` is not set,
    those of another run, and a newest one that is damaged.
    """
    path = folder / RUN
    found = checkpoints(folder)[-1:]
    parallel.wait_for_all()  # every process has looked before one writes
    if not found:
        if parallel.is_main_process():
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            write_whole(path, json.dumps(sealed(record), indent=2) + "\n")
        return None
    if not resume:
        raise ValueError(f"{folder} holds checkpoints already: resume from them (resume=True), or delete it")
    (newest,) = found
    wanted = (
        f"the record of a run, which its checkpoints need: delete {str(folder)!r}, and resume trains this stage anew"
    )
    if not path.is_file():
        raise ValueError(f"{path} is missing: it is {wanted}")
    before = read_json(path, f"it is {wanted}")
    if not isinstance(before, dict) or not {"steps", "data", "recipe"} <= before.keys():
        raise ValueError(f"{path} is damaged (it lacks steps, data or recipe): it is {wanted}")
    damage = f", or {path} is damaged (another sha256 than when it was written)" if seal_broken(before) else ""
    changed = [key for key in ("steps", "data") if before[key] != record[key]]
    changed += [key for key in record["recipe"] if before["recipe"].get(key) != record["recipe"][key]]
    retired = {key: value for key, value in before["recipe"].items() if key not in record["recipe"]}
    changed += [key for key, value in retired.items() if value != RETIRED.get(f"stage1.{key}")]
    if changed:
        raise ValueError(
            f"{folder} is of a run with other {', '.join(changed)}{damage}: repeat its command, "
            f"or delete {str(folder)!r}"
        )
    if before.get("model", record["model"]) != record["model"]:  # runs of earlier versions do not know it
        raise ValueError(
            f"{folder} is of a run on another model{damage}: its frozen parameters differ, or its configuration; go on "
            f"with the one it began with, or delete {str(folder)!r}"
        )
    refuse_pickles(newest)
    sums = before.get("sums", False)  # runs of earlier versions have none
    if wrong := parallel.agreed(damaged(newest, sums) if parallel.is_main_process() else None):
        raise ValueError(f"{wrong}; {older(newest)}")
    if parallel.is_main_process():
        remove_leftovers(folder)
    return newest
