"""The campaign of faults can fail: what it is there to find is found, and a run under a fault is none of it."""

import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import forks
from benchmarks.faults import campaign, events
from benchmarks.faults.campaign import Campaign, Trial, half_written, harm
from benchmarks.faults.results import Results, differing
from benchmarks.faults.world import Ended
from lizard_models.distill.checkpoint_files import write_sums as sum_up
from lizard_models.files.folders import write_sums


class Small(Campaign):
    """Without a run of its own: for what judges, and what goes on."""

    def __init__(self, folder: Path, then: tuple[Ended, ...] = (), out: Path | None = None) -> None:
        """then: how commands of the world end, in turn."""
        self.said, self.wanted, self.seed, self.workers = [], "right", 0, 2
        self.results = Results(out, {"seed": 0})
        self.say = self.said.append
        ends = iter(then)
        self.world = SimpleNamespace(folder=folder, command=lambda *given: [], run=lambda *given: next(ends))


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_text("right")
    write_sums(folder)
    return folder


DONE = Ended(0, "saved", 1.0)


@pytest.fixture(autouse=True)
def weights(monkeypatch):
    monkeypatch.setattr(campaign, "weights", lambda model: (model / "model.safetensors").read_text())


def judged(out: Path, ended: Ended = DONE, *then: Ended) -> str:
    """The outcome of one trial, whose next commands end with ``then``."""
    small = Small(out.parent, then)
    trial = small._judge("kind", "what", out, ended)
    small._add("one", trial._asdict())
    assert bool(small.said) == (trial.outcome != "same") and small.trials == [trial]
    return trial.outcome


def test_each_outcome_is_told_from_the_others(out, tmp_path):
    assert judged(out) == "same"
    (tmp_path / "out.training").mkdir()
    assert judged(out).startswith("left behind: ['out', 'out.training']")
    (tmp_path / "out.training").rmdir()
    assert judged(out, DONE._replace(left=True)) == "left behind: a process"
    failed = Ended(1, "Traceback (most recent call last)", 1.0)
    assert judged(out, failed, DONE) == "unclear"
    assert judged(out, failed._replace(code=0)) == "unclear"
    assert judged(out, Ended(1, "Aborted!\n", 1.0), DONE) == "same"  # Ctrl-C before the command has begun
    importing = Ended(-2, "Traceback (most recent call last)\n  import\nKeyboardInterrupt\n", 1.0)
    assert judged(out, importing, DONE) == "same" and judged(out, importing._replace(code=130), DONE) == "unclear"
    assert judged(out, Ended(forks.HANGS, "", 1.0), DONE) == "lost: it hangs"
    assert judged(out, Ended(-9, "", 1.0), Ended(forks.HANGS, "", 1.0), DONE) == "lost: it hangs"
    (out / "model.safetensors").write_text("cut")
    assert judged(out) == "half-written: out"  # before its sums are asked, it is another model too
    (out / "SHA256SUMS").unlink()
    write_sums(out)
    assert judged(out) == "different"
    (out / "model.safetensors").unlink()
    (out / "SHA256SUMS").unlink()
    out.rmdir()
    assert judged(out, Ended(-9, "", 1.0), *[Ended(2, "again", 1.0)] * 3) == "lost: it does not go on"


def test_what_an_error_says_to_delete_is_deleted_and_the_run_must_go_on(out, tmp_path):
    work = tmp_path / "out.training"

    def damage(said: str, *then: Ended) -> str:
        (work / "stage1").mkdir(parents=True, exist_ok=True)
        (work / "rows.json").write_text("cut")
        ended = Ended(2, f"error: {work}/rows.json is damaged: {said}", 1.0)
        trial = Small(tmp_path, then)._judge_damage("a file cut", "out.training/rows.json", out, ended)
        return trial.outcome

    assert damage("good luck").startswith("left behind: ['out', 'out.training']")  # it ended there
    assert damage(f"delete '{tmp_path.parent}'").startswith("left behind") and tmp_path.is_dir()
    assert damage(f"delete '{work / 'rows.json'}'", DONE).startswith("left behind")
    assert (work / "stage1").is_dir() and not (work / "rows.json").exists()
    assert damage(f"delete '{work}'", DONE) == "named" and not work.exists()
    assert damage(f"delete '{work}'", DONE._replace(said="Traceback (most recent call last)")) == "unclear"
    assert Small(tmp_path)._judge_damage("a file cut", "out.training/x", out, DONE).outcome == "same"


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


def test_the_table_counts_by_kind(tmp_path):
    small = Small(tmp_path)
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
    outcome = "same"

    def _event(self, kind: str, number: int, fault: object, draw: random.Random, out: Path) -> Trial:
        assert os.listdir(out.parent) == []  # each in a folder of its own
        out.mkdir()
        return Trial(kind, self.events[number - 1], self.outcome, str(draw.random()))

    @property
    def drawn(self) -> dict[str, str]:
        return {name: found["said"] for name, found in self.results.found.items()}


def test_a_campaign_goes_on_where_it_ended_with_the_same_trials(tmp_path):
    """Every event, each once, kinds in turn; what a file has is not tried again, and draws do not depend on it."""
    files = {name: tmp_path / name for name in ("whole", "parts")}
    whole, parts = (Counted(tmp_path, out=file) for file in files.values())
    every = {"kills": 99, "full_disks": 99, "cuts": 99}
    whole.workers = 1
    whole.go(every)
    names = list(whole.drawn)
    assert sorted(names) == sorted([*(f"kill {n}" for n in (1, 2, 3, 4)), *(f"full disk {n}" for n in (1, 2, 4)),
                                    "cut 1", "cut 4"])  # fmt: skip
    assert [name.split()[0] for name in names[:3]] == ["kill", "full", "cut"]
    parts.outcome = "lost"
    parts.go({"kills": 2})
    parts.go(every, minutes=0)  # begins nothing
    before = dict(parts.drawn)
    assert len(before) == 2
    with files["parts"].open("a") as file:
        file.write('{"case": "kill 3", "ki')  # a kill of the campaign itself
    later = Counted(tmp_path, out=files["parts"])
    later.go(every)
    assert later.drawn == whole.drawn and before.items() <= later.drawn.items() and len(later.trials) == 9
    assert [t.outcome for t in later.trials].count("lost") == 2
    assert differing(whole.results, files["parts"]) == (9, {name: "same, there lost" for name in before})
    later.go(every, again=True)
    assert [t.outcome for t in later.trials].count("lost") == 0 and differing(whole.results, files["parts"]) == (9, {})
    with pytest.raises(ValueError, match="another campaign"):
        Results(files["parts"], {"seed": 1})
    with pytest.raises(ValueError, match="no results to compare with: nowhere"):
        differing(whole.results, Path("nowhere"))


def test_a_trial_that_fails_itself_is_no_result(tmp_path):
    small = Counted(tmp_path)
    small.events = ["open a"]
    small._event = lambda *given: 1 / 0
    with pytest.raises(RuntimeError, match="kill 1: not the run but its trial"):
        small.go({"kills": 1})
    assert small.trials == []


def test_drafts_have_one_name_in_every_run():
    said = {
        "open .again.q5_0kx1z/tokenizer.json": "open .again.*/tokenizer.json",
        "sync out.training/stage2/.saving-ab12cd_9": "sync out.training/stage2/.saving-*",
        "open again.training/log.jsonl": "open again.training/log.jsonl",
        "os.remove again.training/plan.json": "os.remove again.training/plan.json",
        "open out.training/.plan.json.11475": "open out.training/.plan.json.*",
        "sync out.training/stage1/checkpoint-2": "sync out.training/stage1/checkpoint-2",
    }
    assert {event: campaign.plain(event) for event in said} == said
