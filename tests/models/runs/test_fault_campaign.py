"""The campaign of faults can fail: what it is there to find is found, and a run under a fault is none of it."""

import os
import random
from pathlib import Path

import pytest

from benchmarks.faults import campaign, events
from benchmarks.faults.campaign import Campaign, Trial, half_written, harm
from benchmarks.faults.results import Results
from benchmarks.faults.world import Ended
from lizard_models.distill.checkpoint_files import write_sums as sum_up
from lizard_models.files.folders import write_sums


class Small(Campaign):
    """Without a world: for what judges."""

    def __init__(self, out: Path | None = None) -> None:
        self.said, self.wanted, self.seed, self.name = [], "right", 0, "one"
        self.results = Results(out, {"seed": 0})
        self.say = self.said.append


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_text("right")
    write_sums(folder)
    return folder


DONE = Ended(0, "saved", 1.0)


def judged(out: Path, monkeypatch, ended: Ended = DONE, code: int = 0) -> str:
    """The outcome of one trial, whose next command ends with ``code``."""
    monkeypatch.setattr(campaign, "weights", lambda model: (model / "model.safetensors").read_text())
    monkeypatch.setattr(campaign, "run", lambda *given: Ended(code, "again", 1.0))
    small = Small()
    small.world = type("World", (), {"command": lambda *given: []})()
    small._judge("kind", "what", out, ended)
    (trial,) = small.trials
    assert bool(small.said) == (trial.outcome != "same")
    return trial.outcome


def test_each_outcome_is_told_from_the_others(out, monkeypatch, tmp_path):
    assert judged(out, monkeypatch) == "same"
    (tmp_path / "out.training").mkdir()
    assert judged(out, monkeypatch).startswith("left behind: ['out', 'out.training']")
    (tmp_path / "out.training").rmdir()
    assert judged(out, monkeypatch, Ended(1, "Traceback (most recent call last)", 1.0)) == "unclear"
    (out / "model.safetensors").write_text("cut")
    assert judged(out, monkeypatch) == "half-written: out"  # before its sums are asked, it is another model too
    (out / "SHA256SUMS").unlink()
    write_sums(out)
    assert judged(out, monkeypatch) == "different"
    (out / "model.safetensors").unlink()
    (out / "SHA256SUMS").unlink()
    out.rmdir()
    assert judged(out, monkeypatch, Ended(-9, "", 1.0), code=2) == "lost: it does not go on"


def test_half_a_checkpoint_and_one_that_is_gone_are_seen(out, monkeypatch, tmp_path):
    step = tmp_path / "out.training" / "stage1" / "checkpoint-2"
    step.mkdir(parents=True)
    (step / "trained.safetensors").write_text("1")
    assert half_written(out).endswith("sums.json is missing")
    sum_up(step)
    assert half_written(out) == ""
    (step / "trained.safetensors").write_text("2")
    assert "trained.safetensors cannot be read" in half_written(out)


def test_events_are_counted_in_a_fork_and_a_fault_comes_at_its_own(tmp_path):
    """What a process does to a folder: five events, then the second of them refused, then killed at the fourth."""

    def work() -> None:
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / "a").write_text("1")
        descriptor = os.open(tmp_path / "w" / "a", os.O_RDONLY)
        os.fsync(descriptor)
        (tmp_path / "w" / "a").rename(tmp_path / "w" / "b")
        (tmp_path / "w" / "b").unlink()

    def forked(fault) -> int:
        child = os.fork()
        if child == 0:
            try:
                fault()
                work()
                os._exit(0)
            except OSError as error:
                os._exit(error.errno)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    listed = tmp_path / "listed"
    assert forked(events.list_into(tmp_path / "w", listed)) == 0
    assert [line.split()[0] for line in listed.read_text().splitlines()] == [
        *("os.mkdir", "open", "sync", "os.rename", "os.remove")
    ]
    assert forked(events.full_at(tmp_path / "w", 2)) == 17  # the folder is there
    (tmp_path / "w").rmdir()
    assert forked(events.full_at(tmp_path / "w", 2)) == 28 and not (tmp_path / "w" / "a").exists()
    (tmp_path / "w").rmdir()
    assert forked(events.kill_at(tmp_path / "w", 4)) == -9 and (tmp_path / "w" / "a").read_text() == "1"


@pytest.mark.parametrize("damage", campaign.DAMAGES)
def test_a_file_is_harmed_as_it_says(tmp_path, damage):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    what = harm(path, damage, random.Random(0))
    if damage == "removed":
        assert not path.exists()
    elif damage == "truncated":
        assert path.read_bytes() == bytes(range(100))[: int(what.split()[1])]
    else:
        changed = [a ^ b for a, b in zip(path.read_bytes(), range(100), strict=True) if a != b]
        assert len(changed) == 1 and changed[0].bit_count() == 1


def test_the_table_counts_by_kind():
    small = Small()
    for name, trial in enumerate(
        [Trial("a", "", "same", ""), Trial("a", "", "lost: x", ""), Trial("b", "", "named", "")]
    ):
        small.results.add(str(name), trial._asdict())
    assert small.table().splitlines()[2:] == [
        "| a | 2 | 1 | 0 | 1 | 0 | 0 | 0 | 0 |",
        "| b | 1 | 0 | 1 | 0 | 0 | 0 | 0 | 0 |",
    ]


class Counted(Small):
    """Whose trials take what they draw, and no time."""

    events = ["open a", "sync a", "os.rename b", "save c"]

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.drawn: list[tuple[str, float]] = []

    def _trial(self, kind: str, number: int, fault: object) -> None:
        self.drawn.append((self.name, self.draw.random()))
        self._add(Trial(kind, self.events[number - 1], "same", ""))


def test_a_campaign_goes_on_where_it_ended_with_the_same_trials(tmp_path):
    """Every event, each once, kinds in turn; what a file has is not tried again, and draws do not depend on it."""
    whole, parts = Counted(tmp_path / "whole"), Counted(tmp_path / "parts")
    every = {"kills": 99, "full_disks": 99, "cuts": 99}
    whole.go(every)
    names = [name for name, _ in whole.drawn]
    assert sorted(names) == sorted([*(f"kill {n}" for n in (1, 2, 3, 4)), *(f"full disk {n}" for n in (1, 2, 4)),
                                    "cut 1", "cut 4"])  # fmt: skip
    assert [name.split()[0] for name in names[:3]] == ["kill", "full", "cut"]
    parts.go({"kills": 2})
    parts.go(every, minutes=0)  # begins nothing
    with (tmp_path / "parts").open("a") as file:
        file.write('{"case": "kill 3", "ki')  # a kill of the campaign itself
    later = Counted(tmp_path / "parts")
    later.go(every)
    assert not {name for name, _ in parts.drawn} & {name for name, _ in later.drawn}
    assert dict(parts.drawn + later.drawn) == dict(whole.drawn) and len(later.trials) == 9
    with pytest.raises(ValueError, match="another campaign"):
        Results(tmp_path / "parts", {"seed": 1})


def test_drafts_have_one_name_in_every_run():
    said = {
        "open .again.q5_0kx1z/tokenizer.json": "open .again.*/tokenizer.json",
        "sync out.training/stage2/.saving-ab12cd_9": "sync out.training/stage2/.saving-*",
        "open again.training/log.jsonl": "open again.training/log.jsonl",
        "os.remove again.training/plan.json": "os.remove again.training/plan.json",
    }
    assert {event: campaign.plain(event) for event in said} == said
