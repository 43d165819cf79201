"""A loss that runs away: warned of, rolled back once at half the rate, then stopped; one high batch is none."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from training import Sequences, arguments, fresh, recipes

from lizard_models.distill import TrainingInterrupted, train_stage1, trainer
from lizard_models.distill.divergence import JUDGED_FROM, PATIENCE, Diverged
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.distill.stage2 import LanguageModelling

STEPS = 44


def high(monkeypatch, judged, kind=AttentionTransfer):
    """The loss counts ten times in the steps that ``judged`` names, by the number of forwards so far in this run."""
    plain, calls = kind.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        loss = plain(self, *args, **kwargs)["loss"]
        return {"loss": loss * 10 if judged(len(calls)) else loss}

    monkeypatch.setattr(kind, "forward", forward)
    return calls


def train(folder, model=None, **changes):
    model = fresh() if model is None else model
    run = dataclasses.replace(arguments(folder, save_steps=4), log=folder.with_name("log.jsonl"), **changes)
    return model, train_stage1(model, Sequences(), run, recipes(model, steps=STEPS)[0])


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in folder.with_name("log.jsonl").read_text().splitlines()]


def events(folder) -> list[tuple]:
    return [(e["event"], e["step"]) for e in lines(folder) if e.get("event") not in (None, "saved", "began")]


def test_a_loss_that_stays_high_goes_back_once_at_half_the_rate(tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    calls = high(monkeypatch, lambda n: 30 <= n < 42)  # 40 steps, then from 28 on, the first two of them high
    train(folder)
    back = 30 + PATIENCE
    assert events(folder) == [("high", 30), ("rolled back", back), ("resumed", 28), ("high", 29)]
    assert len(calls) == back + STEPS - 28
    rates = {e["step"]: e["learning_rates"] for e in lines(folder) if "event" not in e}  # the later of two
    plain = tmp_path / "plain"
    monkeypatch.undo()
    train(plain)
    usual = {e["step"]: e["learning_rates"] for e in lines(plain) if "event" not in e}
    for step in range(29, STEPS + 1):
        assert rates[step] == pytest.approx([rate / 2 for rate in usual[step]])
    said = " ".join(capfd.readouterr().err.split())
    assert "warning: test: relative error is" in said and "times what it was (median" in said
    assert "and stays: back to checkpoint-28, once, with half the learning rate" in said
    saved = [e["step"] for e in lines(folder) if e.get("event") == "saved"]
    assert not set(saved[: saved.index(28) + 1]) & set(range(30, back + 1))  # nothing of it was saved


def test_the_second_time_it_stops_in_whichever_process(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    wanted = r"relative error is .* again, at half the learning rate; '.*checkpoint-32' is from before"
    with monkeypatch.context() as twice:
        high(twice, lambda n: 30 <= n < 41 or n >= 45)  # 40 steps, back to 28, and again from step 33 on
        with pytest.raises(Diverged, match=wanted):
            train(folder)
    newest = trainer.checkpoints(folder)[-1]
    rates = json.loads((newest / "scheduler.json").read_text())["base_lrs"]
    assert newest.name == "checkpoint-32" and rates[0] == recipes(fresh())[0].learning_rate / 2
    with monkeypatch.context() as forever:
        high(forever, lambda n: True)
        with pytest.raises(Diverged, match=wanted):  # the checkpoint knows that its rate was halved
            train(folder, resume=True)
    assert [event for event, _ in events(folder)].count("rolled back") == 1
    assert train(folder, resume=True)[1].steps == STEPS


def test_one_high_batch_and_a_high_start_are_no_divergence(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    high(monkeypatch, lambda n: n in (25, 26, 40) or n < JUDGED_FROM)
    train(folder)
    assert [event for event, _ in events(folder)] in ([], ["high"], ["high", "high"])


def test_a_signal_while_it_is_high_still_ends_with_a_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    calls = []

    def judged(n):
        calls.append(n)
        if n == 34:
            os.kill(os.getpid(), signal.SIGTERM)
        return n >= 30

    high(monkeypatch, judged)
    with pytest.raises(TrainingInterrupted):
        train(folder)
    assert [path.name for path in trainer.checkpoints(folder)][-1] == "checkpoint-34"


def test_signals_while_it_is_high_leave_the_last_good_checkpoint_to_go_back_to(tmp_path, monkeypatch):
    """As many as a scheduler sends: what they ask for is beside it, and is not what the stage goes back to."""
    folder = tmp_path / "run"
    for stop in (32, 34, 36):
        with monkeypatch.context() as ran:
            begins = stop - 2 if stop > 32 else 0

            def judged(n, stop=stop, begins=begins):
                if begins + n == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return begins + n >= 30

            high(ran, judged)
            with pytest.raises(TrainingInterrupted):
                train(folder, resume=stop > 32)
        names = [path.name for path in trainer.checkpoints(folder)]
        assert (names[0], names[-1]) == ("checkpoint-28", f"checkpoint-{stop}") and len(names) <= 3
    with monkeypatch.context() as ran:
        calls = high(ran, lambda n: n <= 4)  # steps 37 to 40, then from 28 on as ever
        train(folder, resume=True)
    assert [event for event, _ in events(folder)].count("high") == 1  # it is known since when
    assert events(folder)[-2:] == [("rolled back", 40), ("resumed", 28)] and len(calls) == 4 + STEPS - 28
    assert {path.name for path in trainer.checkpoints(folder)} == {"checkpoint-40", f"checkpoint-{STEPS}"}


def test_factors_and_reports_are_checked_before_a_step(tmp_path):
    for changes, said in (
        ({"diverged": 1.0}, "diverged: it must be above 1"),
        ({"diverged": float("nan")}, "diverged: it must be above 1"),
        ({"report_to": ("nowhere",)}, "report_to: transformers finds no 'nowhere' here"),
    ):
        with pytest.raises(ValueError, match=said):
            train(tmp_path / "run", **changes)


def test_lines_say_what_trainers_log_says_and_more(tmp_path):
    folder = tmp_path / "run"
    model, result = train(folder)
    found = [e for e in lines(folder) if "event" not in e]
    assert [(e["step"], e["loss"]) for e in found] == result.losses
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    for entry, line in zip((e for e in state if "loss" in e), found, strict=True):
        assert line["grad_norm"] == entry["grad_norm"] and entry["learning_rate"] == line["learning_rates"][0]
        assert line["tokens_per_second"] > 0 and line["resident_bytes"] > 1e6 and line["stage"] == "test"
    assert lines(folder)[0]["event"] == "began" and lines(folder)[0]["steps"] == STEPS
    path = folder.with_name("log.jsonl")
    path.write_text(path.read_text()[:-30])  # a kill in the middle of a line
    _, again = train(folder, fresh(), resume=True)
    assert again.losses == result.losses  # finished: loaded, and nothing is logged
    trainer.LogFile(path, "later").write(event="here")
    *_, cut, last = path.read_text().splitlines()
    assert json.loads(last)["event"] == "here"
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut)


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capfd):
    model = fresh()
    run = dataclasses.replace(arguments(tmp_path / "run"), log=tmp_path / "nowhere" / "log.jsonl")
    train_stage1(model, Sequences(), run, recipes(model, steps=3)[0])
    assert capfd.readouterr().err.count("the run goes on without its log") == 1
    assert torch.isfinite(next(p for _, p in model.stage_parameters())).all()


def test_stage_2_is_judged_too(tmp_path, monkeypatch):
    from lizard_models.distill import train_stage2

    high(monkeypatch, lambda n: 22 <= n < 33, LanguageModelling)
    model = fresh()
    run = dataclasses.replace(arguments(tmp_path / "run", save_steps=4), log=tmp_path / "log.jsonl")
    train_stage2(model, Sequences(), run, recipes(model, steps=36)[1])
    assert ("rolled back", 32) in events(tmp_path / "run")
