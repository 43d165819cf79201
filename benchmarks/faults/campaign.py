"""Trials: one fault, then the command that goes on, until it is done; and what became of the work."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from benchmarks.faults import events
from benchmarks.faults.results import Results
from benchmarks.faults.world import Ended, World, end, run, start, weights
from lizard_models.distill.checkpoint_files import damaged as damaged_checkpoint
from lizard_models.distill.resume import checkpoints, step_of
from lizard_models.files.folders import SUMS, damaged
from lizard_models.runs.plan import STAGES, work_folder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
DAMAGES = ("flipped", "truncated", "removed")
ATTEMPTS = 3  # to go on after one fault
Named = tuple[str, Callable[[], None]]  # a trial and its name


class Trial(NamedTuple):
    """A fault, and its outcome: "same" model, or what went wrong."""

    kind: str
    what: str
    outcome: str
    said: str


class Campaign:
    """Trials, each with one fault, compared with a run that nothing happened to.

    A trial has a name, by which ``results`` knows it, and draws its numbers by that name and the seed: whatever ran
    before, it is the same trial.
    """

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None], out: Path | None = None) -> None:
        """out: file of the results, gone on with if it is there. Raises ValueError if it is of another campaign."""
        self.world, self.seed, self.say = World(folder), seed, say
        whole = self.world.folder / "whole" / "out"
        whole.parent.mkdir()
        first = run(self.world.command(whole), self.world.folder / "said")
        listed = self.world.folder / "events"
        again = run(
            self.world.command(whole.with_name("again")),
            self.world.folder / "said",
            events.list_into(whole.parent, listed),
        )
        if first.code or weights(whole) != weights(whole.with_name("again")):
            raise RuntimeError(f"the run is not the same twice without a fault: {first.said[-2000:]}")
        self.wanted, self.seconds = weights(whole), again.seconds
        self.events = [plain(kind) for kind in listed.read_text().splitlines()]
        self.results = Results(out, {"seed": seed, "weights": self.wanted, "events": self.events})
        say(f"a run takes {self.seconds:.1f} s here and has {len(self.events)} events in the file system")

    @property
    def trials(self) -> list[Trial]:
        """Every trial so far, those of earlier runs too."""
        return [Trial(**found) for found in self.results.found.values()]

    def go(self, counts: dict[str, int], minutes: float = math.inf) -> None:
        """As many trials of each kind, one of each in turn, or all that it has; those with a result are left out.

        counts: by name of the method that gives them. minutes: after which no other trial begins.
        """
        kinds = [islice(getattr(self, name)(), count) for name, count in counts.items()]
        ends = time.monotonic() + 60 * minutes
        for name, trial in (one for turn in zip_longest(*kinds) for one in turn if one is not None):
            if time.monotonic() >= ends:
                break
            if name not in self.results.found:
                self.name, self.draw = name, random.Random(f"{self.seed} {name}")
                trial()

    def signals(self) -> Iterator[Named]:
        """Signals in turn at random moments, without an end."""
        for n in count():
            number = SIGNALS[n % len(SIGNALS)]
            yield f"signal {n}", partial(self._signal, number)

    def kills(self) -> Iterator[Named]:
        """SIGKILL in front of every event of the file system, in a drawn order."""
        for number in self._events(""):
            yield f"kill {number}", partial(self._trial, "SIGKILL at an event", number, events.kill_at)

    def full_disks(self) -> Iterator[Named]:
        """A disk that is full from an event on that writes."""
        for number in self._events("open|save|os.mkdir|sync"):
            yield f"full disk {number}", partial(self._trial, "full disk", number, events.full_at)

    def cuts(self) -> Iterator[Named]:
        """Files that are cut in the middle of a write, from an event on that opens or writes one."""
        for number in self._events("open|save"):
            yield f"cut {number}", partial(self._cut, number)

    def files(self) -> Iterator[Named]:
        """Each file of the work of a run that was killed in stage 2: flipped, truncated, removed."""
        stopped = self.world.folder / "stopped"
        if not stopped.is_dir():
            stopped.mkdir()
            at = next(i for i, kind in enumerate(self.events, 1) if kind.startswith("os.rename") and "stage2/" in kind
                      and "checkpoint-4" in kind)  # fmt: skip
            run(self.world.command(stopped / "out"), self.world.folder / "said", events.kill_at(stopped, at))
        work = work_folder(stopped / "out")
        names = [p.relative_to(stopped) for p in sorted(work.rglob("*")) if p.is_file() and p.name != ".lock"]
        every = [(name, damage) for name in names for damage in DAMAGES]
        random.Random(self.seed).shuffle(every)
        for name, damage in every:
            yield f"{damage} {plain(str(name))}", partial(self._damage, work, name, damage)

    def _signal(self, number: signal.Signals) -> None:
        moment = self.draw.uniform(0, self.seconds)
        with self._folder() as (out, said):
            started = time.monotonic()
            child = start(self.world.command(out), said)
            time.sleep(moment)
            os.kill(child, number)
            ended = end(child, said, started)
            self._judge("a signal at a random moment", f"{number.name} {moment / self.seconds:.3f}", out, ended)

    def _cut(self, number: int) -> None:
        size = self.draw.choice([0, 1, 100, 1000, 20_000])
        self._trial("writes cut short", number, lambda folder, at: events.cut_at(folder, at, size))

    def _damage(self, work: Path, name: Path, damage: str) -> None:
        with self._folder() as (out, said):
            shutil.copytree(work, work_folder(out))
            what = harm(out.parent / name, damage, self.draw)
            ended = run(self.world.command(out, "--resume"), said)
            self._judge_damage(f"a file {damage}", f"{name}{what}", out, ended)

    def _trial(self, kind: str, number: int, fault: Callable[[Path, int], Callable[[], None]]) -> None:
        with self._folder() as (out, said):
            ended = run(self.world.command(out), said, fault(out.parent, number))
            self._judge(kind, f"{number}: {self.events[number - 1]}", out, ended)

    def _events(self, kinds: str) -> list[int]:
        """Numbers of all events of these kinds, in a drawn order, so that the first ones are a fair sample."""
        every = [n for n, kind in enumerate(self.events, 1) if re.match(kinds, kind)]
        return random.Random(f"{self.seed} {kinds}").sample(every, len(every))

    def _folder(self) -> Folder:
        return Folder(self.world.folder / "trial")

    def _judge(self, kind: str, what: str, out: Path, ended: Ended) -> None:
        wrong = half_written(out)
        before = trained(out)
        said = [f"[{ended.code}] {last_line(ended.said)}"]
        unclear = ended.unclear
        for _ in range(ATTEMPTS):
            if ended.code == 0 and weights_of(out):
                break
            ended = run(self.world.command(out, "--resume", "auto"), out.parent / "said again")
            said.append(f"[{ended.code}] {last_line(ended.said)}")
            unclear = unclear or ended.unclear
            wrong = wrong or half_written(out)
            if "stopped" not in ended.said and trained(out) < before and not out.exists():
                wrong = wrong or "lost: a checkpoint is gone"
        self._record(kind, what, wrong, unclear, out, said)

    def _judge_damage(self, kind: str, what: str, out: Path, ended: Ended) -> None:
        """A damaged file is named, or makes no difference; the command ends in one of both."""
        path = Path(what.split(" ")[0])
        said = [f"[{ended.code}] {last_line(ended.said)}"]
        names = (path.name, f"/{path.parent.name}/") if path.name == "sums.json" else (path.name,)
        if ended.code == 2 and any(name in ended.said for name in names):  # of sums, their folder does
            self._add(Trial(kind, what, "named", said[0]))
        else:
            self._record(kind, what, half_written(out), ended.unclear, out, said)

    def _record(self, kind: str, what: str, wrong: str, unclear: bool, out: Path, said: list[str]) -> None:
        found = weights_of(out)
        if not wrong and not found:
            wrong = "lost: it does not go on"
        if not wrong and found != self.wanted:
            wrong = "different"
        if not wrong and (rest := sorted(p.name for p in out.parent.iterdir() if not p.name.startswith("said"))) != [
            "out"
        ]:
            wrong = f"left behind: {rest}"
        self._add(Trial(kind, what, wrong or ("unclear" if unclear else "same"), " | ".join(said)))

    def _add(self, trial: Trial) -> None:
        self.results.add(self.name, trial._asdict())
        if trial.outcome not in ("same", "named"):
            self.say(f"{trial.outcome}: {trial.kind}, {trial.what}: {trial.said}")

    def table(self) -> str:
        """By kind of fault: trials, and how many ended in which way."""
        columns = ("same", "named", "lost", "different", "half-written", "left behind", "unclear")
        rows = ["| fault | trials | the same model | named and refused | lost | another model | half-written | left "
                "behind | unclear |", "|---|" + "---|" * 8]  # fmt: skip
        trials = self.trials
        for kind in dict.fromkeys(trial.kind for trial in trials):
            found = Counter(t.outcome.partition(":")[0] for t in trials if t.kind == kind)
            rows.append(f"| {kind} | {found.total()} | " + " | ".join(str(found[name]) for name in columns) + " |")
        return "\n".join(rows)


class Folder:
    """An empty folder for one trial, gone after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> tuple[Path, Path]:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder / "out", self.folder / "said"

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def plain(event: str) -> str:
    """An event or a path without the random part of a draft's name, so that runs can be compared."""
    return re.sub(r"(\.saving-|\.[\w.]+\.)[a-z0-9_]{8}(?=/|$)", r"\1*", event)


def harm(path: Path, damage: str, draw: random.Random) -> str:
    """Damages a file, and says where."""
    data = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
        return ""
    if damage == "truncated":
        end = draw.randrange(max(1, len(data)))
        path.write_bytes(data[:end])
        return f" at {end} of {len(data)}"
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f" bit {bit} of byte {place}"


def half_written(out: Path) -> str:
    """What looks whole and is not, empty if nothing does."""
    if out.exists() and (not (out / SUMS).is_file() or damaged(out)):
        return f"half-written: {out.name}"
    for checkpoint in all_checkpoints(out):
        if wrong := damaged_checkpoint(checkpoint, True):
            return f"half-written: {wrong}"
    return ""


def all_checkpoints(out: Path) -> Iterator[Path]:
    """Those of all stages."""
    for stage in STAGES:
        yield from checkpoints(work_folder(out) / stage)


def trained(out: Path) -> list[int]:
    """The newest step of each stage, 0 for a stage that has not begun."""
    return [max((step_of(c) for c in checkpoints(work_folder(out) / stage)), default=0) for stage in STAGES]


def weights_of(out: Path) -> str:
    """The digest of a finished model, empty if there is none."""
    return weights(out) if (out / "model.safetensors").is_file() else ""


def last_line(text: str) -> str:
    """The end of what a command said."""
    return (text.strip().splitlines() or [""])[-1][-300:]
