"""A finished stage 1, out of a saved model or the work folder of a run, as what another plan begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lizard_layers.config import tuples
from lizard_models.config import LizardConfig
from lizard_models.distill import Stage0Result, StageResult
from lizard_models.distill.checkpoint_files import damaged as damaged_checkpoint
from lizard_models.distill.resume import RUN, checkpoints, step_of
from lizard_models.distill.score_files import SCORES, load_scores
from lizard_models.distill.trainer import TRAINED
from lizard_models.files.folders import SUMS, damaged
from lizard_models.files.records import read_json, read_record
from lizard_models.files.weights import content_digest, name_some, nonfinite, read_shards
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.keep_places import keep_places
from lizard_models.model.layer_configs import lizard_config
from lizard_models.teachers.loading import TRAINING

PLAN, KEPT = "plan.json", "kept_keys.json"
FREE = ("version", "name", "stage2", "stage3", "wide_layers", "wide_window", "wide_gate_stretch")  # of no earlier stage
PARTS = ("stage0", "stage1")


class Start(NamedTuple):
    """What stages 0 and 1 left in a model."""

    results: dict[str, StageResult]
    digest: str  # of the parameters that they trained


def start_record(folder: Path) -> dict[str, Any]:
    """What a run recorded of itself in a saved model's folder, or in its work folder.

    Raises ValueError for another folder, and one whose stage 1 is not finished or is not the last stage.
    """
    saved = folder / TRAINING
    path = saved if saved.is_file() else folder / PLAN
    if not path.is_file():
        raise ValueError(f"start: {str(folder)!r} holds neither a model of lizard-attn nor the work of a run")
    record = read_json(path, "give another folder")
    if "config" not in record or "teacher_sha256" not in record:
        raise ValueError(f"start: {path} lacks the configuration or the teacher's sha256: it is of an earlier version")
    if path == saved:
        if "stage2" in record["stages"] or "stage1" not in record["stages"]:
            stages = ", ".join(record["stages"]) or "none"
            raise ValueError(f"start: {str(folder)!r} has had {stages}; wanted a model after stage 1 and no stage 2")
    else:
        _last(folder / "stage1")
    return record


def start_config(folder: Path, config: LizardConfig) -> LizardConfig:
    """A plan's configuration with the recipes that stages 0 and 1 of ``folder`` had.

    Raises ValueError where the plan asks for another model than those stages trained, naming what differs.
    """
    record = start_record(folder)
    theirs, ours = LizardConfig.from_dict(record["config"]).to_dict(), config.to_dict()
    if record.get("kept_keys") == ours["attention"]["kept_keys"]:  # which may have been shared out since
        theirs["attention"]["kept_keys"] = ours["attention"]["kept_keys"]
    other = []
    for name in ours:
        if name in FREE or name in PARTS or theirs[name] == ours[name]:
            continue
        fields = [name] if not isinstance(ours[name], dict) else [f"{name}.{key}" for key in ours[name]]
        for field in fields:
            section, _, key = field.partition(".")
            pair = (theirs[section][key], ours[section][key]) if key else (theirs[section], ours[section])
            other += [f"{field} {pair[0]!r}, not {pair[1]!r}"] if pair[0] != pair[1] else []
    if other:
        raise ValueError(f"start: stage 1 in {str(folder)!r} was trained with {'; '.join(other)}: ask for the same")
    return config.replace(**{part: theirs[part] for part in PARTS})


def begin_from(folder: Path, model: LizardCausalLM, teacher_sha256: str) -> Start:
    """Writes what stages 0 and 1 trained into a model fresh from ``linearize``, with the places that were shared out.

    Raises ValueError for another teacher, and for files that are damaged or of another model.
    """
    record = start_record(folder)
    if record["teacher_sha256"] != teacher_sha256:
        raise ValueError(
            f"start: stage 1 in {str(folder)!r} was trained on another teacher (sha256 "
            f"{record['teacher_sha256'][:12]}, this one's is {teacher_sha256[:12]})"
        )
    saved = (folder / TRAINING).is_file()
    places = record["config"]["attention"].get("kept_keys", 0)
    if saved and isinstance(places, list) and lizard_config(model.config).attention.kept_keys != tuples(places):
        keep_places(model, places)
    found, results = _saved(folder, record) if saved else _working(folder, model)
    wanted = dict(model.lizard_parameters()) if saved else dict(model.stage_parameters())
    if other := sorted(found.keys() ^ wanted.keys()):
        raise ValueError(f"start: {str(folder)!r} is of another model: {name_some(other)} is in one of them alone")
    if bad := nonfinite(found):
        raise ValueError(f"start: {str(folder)!r} holds numbers that are not finite: {name_some(bad)}")
    with torch.no_grad():
        for name, value in found.items():
            if value.shape != wanted[name].shape:
                shapes = f"{list(value.shape)}, wanted {list(wanted[name].shape)}"
                raise ValueError(f"start: {name} in {str(folder)!r} has the shape {shapes}")
            wanted[name].copy_(value)
    return Start(results, content_digest(dict(model.lizard_parameters()), {}))


def _saved(folder: Path, record: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, StageResult]]:
    if not (folder / SUMS).is_file():
        raise ValueError(f"start: {str(folder)!r} has no {SUMS}, by which its files are known to be whole")
    if bad := damaged(folder):
        raise ValueError(f"start: {', '.join(bad)} in {str(folder)!r} is damaged: copy the model again")
    tensors: dict[str, Tensor] = {}
    for shard in read_shards(folder):
        with safe_open(shard.path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in shard.shapes if ".lizard." in name}
    kinds = {"stage0": Stage0Result, "stage1": StageResult}
    results = {name: kinds[name](**values) for name, values in record["stages"].items()}
    for result in results.values():
        result.losses = [(step, loss) for step, loss in result.losses]
    return tensors, results


def _working(folder: Path, model: LizardCausalLM) -> tuple[dict[str, Tensor], dict[str, StageResult]]:
    results: dict[str, StageResult] = {}
    if model.key_scores() and (folder / "stage0" / SCORES).is_file():
        last = _last(folder / "stage0")
        results["stage0"] = Stage0Result(**vars(_result(last)), r2=load_scores(folder / "stage0", model.key_scores()))
        if chosen := read_record(folder / KEPT, f"end the run in {str(folder)!r}, and begin with its model", False):
            keep_places(model, chosen["places"])
    last = _last(folder / "stage1")
    results["stage1"] = _result(last)
    tensors = load_file(last / TRAINED)
    return {name.removeprefix("model."): value for name, value in tensors.items()}, results


def _last(stage: Path) -> Path:
    """The checkpoint of a finished stage's last step."""
    found = checkpoints(stage)[-1:]
    record = read_json(stage / RUN, "give another folder") if (stage / RUN).is_file() else {}
    if not found or step_of(found[0]) != record.get("steps"):
        at = f"step {step_of(found[0])} of {record.get('steps')}" if found else "no checkpoint"
        raise ValueError(f"start: {stage.name} in {str(stage.parent)!r} is not finished ({at}): end it first")
    if wrong := damaged_checkpoint(found[0], record.get("sums", False)):
        raise ValueError(f"start: {wrong}")
    return found[0]


def _result(checkpoint: Path) -> StageResult:
    history = read_json(checkpoint / "trainer_state.json", "give another folder")["log_history"]
    data = read_json(checkpoint.parent / RUN, "give another folder")["data"]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    with safe_open(checkpoint / TRAINED, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    count = sum(int(torch.Size(shape).numel()) for shape in shapes)
    return StageResult(step_of(checkpoint), 0.0, losses, count, data)
