"""A run goes on with the teacher it began with alone: its weights and its configuration, by content."""

import dataclasses
import json
import shutil

import pytest
import torch
from cli_calls import call, error, few_steps
from readable import save_teacher, save_texts
from safetensors.torch import load_file, save_file
from tiny import teacher
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models.distill import TrainingInterrupted, train_stage1, train_stage2
from lizard_models.runs import linearize_run
from lizard_models.teachers.find import load_teacher, teacher_digest

SMALL = few_steps(3, 2)


def edit_weights(folder, name: str) -> None:
    """One bit of one number, with size and time of the file as they were."""
    path = folder / "model.safetensors"
    before = path.stat()
    weights = load_file(path)
    weights[name].view(torch.int32).flatten()[7] ^= 1
    save_file(weights, path, metadata={"format": "pt"})
    assert path.stat().st_size == before.st_size


def edit_rope(folder) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["rope_parameters"] = values.get("rope_parameters") or {"rope_type": "default"}
    values["rope_parameters"]["rope_theta"] = 20_000.0
    path.write_text(json.dumps(values))


CHANGES = {
    "projection": lambda folder: edit_weights(folder, "model.layers.1.self_attn.q_proj.weight"),
    "embedding": lambda folder: edit_weights(folder, "model.embed_tokens.weight"),
    "norm": lambda folder: edit_weights(folder, "model.norm.weight"),
    "rope": edit_rope,
}


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A command whose run stopped in front of stage 2."""
    save_teacher(tmp_path / "teacher")
    save_texts(tmp_path / "texts")
    out = tmp_path / "out"
    command = ["linearize", tmp_path / "teacher", "--data", tmp_path / "texts", *SMALL, "--out", out]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(linearize_run, "train_stage2", stop)
        call(*command, code=130)
    return command, tmp_path


@pytest.mark.parametrize("change", CHANGES)
def test_another_teacher_is_refused_and_the_old_one_goes_on(stopped, change):
    command, folder = stopped
    shutil.copytree(folder / "teacher", folder / "kept")
    CHANGES[change](folder / "teacher")
    line = error(*command, "--resume")
    assert line.startswith("error: --resume: teacher") and "weights or its configuration changed" in line
    shutil.rmtree(folder / "teacher")
    shutil.copytree(folder / "kept", folder / "teacher")
    call(*command, "--resume")
    digest = json.loads((folder / "out" / "training.json").read_text())["teacher_sha256"]
    assert digest == teacher_digest(load_teacher(str(folder / "teacher")))


def test_a_run_of_before_goes_on(stopped):
    command, folder = stopped
    path = folder / "out.training" / "plan.json"
    plan = json.loads(path.read_text())
    del plan["teacher_sha256"]
    path.write_text(json.dumps(plan))
    call(*command, "--resume")
    record = json.loads((folder / "out" / "training.json").read_text())
    assert record["teacher_sha256"] == teacher_digest(load_teacher(str(folder / "teacher")))


def test_the_digest_is_of_the_content_alone(tmp_path):
    made = teacher()
    made.save_pretrained(tmp_path / "a")
    made.save_pretrained(tmp_path / "b", max_shard_size="50KB")
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "4.0.0", "use_cache": False}))
    first = teacher_digest(load_teacher(str(tmp_path / "a")))
    assert teacher_digest(load_teacher(str(tmp_path / "b"))) == first
    assert teacher_digest(load_teacher(str(tmp_path / "a"), dtype=torch.bfloat16)) != first
    CHANGES["rope"](tmp_path / "a")
    assert teacher_digest(load_teacher(str(tmp_path / "a"))) != first


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_alone_knows_its_model_too(tmp_path, stage):
    def train(model, stop_at: int | None = None, **changes):
        run, recipe = arguments(tmp_path, **changes), recipes(model, steps=6)[stage - 1]
        return (train_stage1 if stage == 1 else train_stage2)(model, Sequences(stop_at=stop_at), run, recipe)

    def other_weight(model) -> None:
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-3

    with pytest.raises(TrainingInterrupted):
        train(fresh(), stop_at=6)
    spoilt, theta, window = fresh(), fresh(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), fresh()
    other_weight(spoilt)
    window.config.lizard = window.config.lizard | {"attention": window.config.lizard["attention"] | {"window": 16}}
    for model in (spoilt, theta, window):
        with pytest.raises(ValueError, match="a run on another model: its frozen parameters differ, or its config"):
            train(model, resume=True)
    train(fresh(), resume=True)


def test_stage_2_goes_on_whatever_stage_1_of_the_same_teacher_left(tmp_path):
    """What trains is in the checkpoint; what it was before does not matter."""
    whole, parts, again = fresh(), fresh(), fresh()
    recipe = recipes(whole, steps=4)[1]
    whole, _ = train_stage2(whole, Sequences(), arguments(tmp_path / "a"), recipe)
    run = arguments(tmp_path / "b")
    with pytest.raises(TrainingInterrupted):
        train_stage2(parts, Sequences(stop_at=3), run, recipe)
    again, _ = train_stage2(again, Sequences(), dataclasses.replace(run, resume=True), recipe)
    assert moved(snapshot(whole), again) == set()
