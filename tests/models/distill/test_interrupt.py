"""Ctrl-C and SIGTERM stop a run, whichever step they come in."""

import dataclasses
import os
import signal

import pytest
from cli_calls import call, error
from readable import save_teacher, save_texts
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models.distill import TrainingInterrupted, train_stage1, train_stage2, trainer
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.distill.stage2 import LanguageModelling
from lizard_models.runs.plan import work_folder


def signal_in(monkeypatch, kind: type, step: int, number: int) -> None:
    plain, calls = kind.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_signal_in_the_last_step_stops_after_it(tmp_path, monkeypatch, number, stage):
    def train(model, **changes):
        run, recipe = arguments(tmp_path, **changes), recipes(model, steps=3)[stage - 1]
        return (train_stage1 if stage == 1 else train_stage2)(model, Sequences(), run, recipe)

    with monkeypatch.context() as signalled, pytest.raises(TrainingInterrupted, match="test stopped at step 3 of 3"):
        signal_in(signalled, AttentionTransfer if stage == 1 else LanguageModelling, 3, number)
        train(fresh())
    assert [path.name for path in trainer.checkpoints(tmp_path)] == ["checkpoint-3"]
    train(fresh(), resume=True)


def test_a_signal_while_the_last_checkpoint_is_written_stops_after_it(tmp_path, monkeypatch):
    whole, again = fresh(), fresh()
    recipe = recipes(whole, steps=3)[0]
    train_stage1(whole, Sequences(), arguments(tmp_path / "a"), recipe)
    original = trainer.save_file

    def late(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    run = arguments(tmp_path / "b")
    with monkeypatch.context() as signalled, pytest.raises(TrainingInterrupted):
        signalled.setattr(trainer, "save_file", late)
        train_stage1(fresh(), Sequences(), run, recipe)
    train_stage1(again, Sequences(), dataclasses.replace(run, resume=True), recipe)
    assert moved(snapshot(whole), again) == set()


@pytest.mark.parametrize(("stage", "kind"), [("stage1", AttentionTransfer), ("stage2", LanguageModelling)])
def test_the_command_begins_no_other_stage(tmp_path, monkeypatch, stage, kind):
    save_teacher(tmp_path / "teacher")
    save_texts(tmp_path / "texts")
    command = ["linearize", tmp_path / "teacher", "--data", tmp_path / "texts", "--out", tmp_path / "out"]
    command += ["--stage1-steps", "2", "--stage2-steps", "2", "--seq-len", "64", "--batch-size", "2"]
    command += ["--preset", "plain", "--device", "cpu"]
    with monkeypatch.context() as signalled:
        signal_in(signalled, kind, 2, signal.SIGINT)
        line = error(*command, code=130)
    assert "stopped at step 2 of 2" in line and "go on with:" in line
    work = work_folder(tmp_path / "out")
    assert (work / stage / "checkpoint-2").is_dir() and not (tmp_path / "out").exists()
    assert (work / "stage2").exists() == (stage == "stage2")
    assert "saved:" in call(*command, "--resume").output
