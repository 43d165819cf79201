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
from typing import Any, NamedTuple

from benchmarks import forks
from benchmarks.faults import events
from benchmarks.faults.pool import Pool
from benchmarks.faults.results import Results
from benchmarks.faults.world import Ended, Fault, World, end, weights
from lizard_models.distill.checkpoint_files import damaged as damaged_checkpoint
from lizard_models.distill.resume import checkpoints, step_of
from lizard_models.files.folders import SUMS, damaged
from lizard_models.runs.plan import STAGES, work_folder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
DAMAGES = ("flipped", "truncated", "removed")
ATTEMPTS = 3  # to go on after one fault
EARLIER = 0.8  # of the moment of a signal that came too late
FINE = ("same", "named")
Named = tuple[str, Callable[[random.Random, Path], "Trial"]]  # a trial and its name


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

    def __init__(
        self,
        folder: Path,
        seed: int,
        say: Callable[[str], None],
        out: Path | None = None,
        fresh: bool = False,
        workers: int = 1,
    ) -> None:
        """out: file of the results, gone on with if it is there. fresh: of ``World``. workers: trials at the same time.

        Raises ValueError if the file is of another campaign.
        """
        self.world, self.seed, self.say, self.workers = World(folder, fresh), seed, say, workers
        if not fresh:
            self.world.warm()
        places = [folder / name for name in ("one", "other")]
        commands = [self.world.command(place / "out") for place in places]
        faults = [events.list_into(place, folder / f"events of {place.name}") for place in places]
        started = time.monotonic()
        for place in places:
            place.mkdir()
        if workers == 1:
            found = [self.world.run(*one) for one in zip(commands, [p / "said" for p in places], faults, strict=True)]
        else:  # as slow as trials are beside each other
            children = [self.world.start(c, p / "said", f) for c, p, f in zip(commands, places, faults, strict=True)]
            found = [end(child, place / "said", started) for child, place in zip(children, places, strict=True)]
        lists = [(folder / f"events of {place.name}").read_text().splitlines() for place in places]
        made, listed = ({weights_of(p / "out") for p in places}, {tuple(map(plain, kinds)) for kinds in lists})
        if any(ended.code or ended.left for ended in found) or len(made) > 1 or len(listed) > 1:
            raise RuntimeError(f"the run is not the same twice without a fault: {[e.said[-1000:] for e in found]}")
        (self.wanted,), (kinds,) = made, listed
        self.seconds, self.events = found[0].seconds, list(kinds)
        self.results = Results(out, {"seed": seed, "weights": self.wanted, "events": self.events})
        say(f"a run takes {self.seconds:.1f} s here and has {len(self.events)} events in the file system")

    @property
    def trials(self) -> list[Trial]:
        """Every trial so far, those of earlier runs too."""
        return [Trial(**found) for found in self.results.found.values()]

    def go(self, counts: dict[str, int], minutes: float = math.inf, again: bool = False) -> None:
        """As many trials of each kind, one of each in turn, or all that it has; those with a result are left out.

        counts: by name of the method that gives them. minutes: after which no other trial begins. again: those whose
        result is not as wanted, too.
        """
        kinds = [islice(getattr(self, name)(), count) for name, count in counts.items()]
        ends = time.monotonic() + 60 * minutes
        with Pool(self.world.folder, self.workers, self._add) as pool:
            for name, trial in (one for turn in zip_longest(*kinds) for one in turn if one is not None):
                if time.monotonic() >= ends:
                    break
                known = self.results.found.get(name)
                if known is None or (again and known["outcome"] not in FINE):
                    draw = random.Random(f"{self.seed} {name}")
                    pool.begin(name, partial(_found, trial, draw))

    def signals(self) -> Iterator[Named]:
        """Signals in turn at random moments, without an end."""
        for n in count():
            yield f"signal {n}", partial(self._signal, SIGNALS[n % len(SIGNALS)])

    def kills(self) -> Iterator[Named]:
        """SIGKILL in front of every event of the file system, in a drawn order."""
        for number in self._events(""):
            yield f"kill {number}", partial(self._event, "SIGKILL at an event", number, events.kill_at)

    def full_disks(self) -> Iterator[Named]:
        """A disk that is full from an event on that writes."""
        for number in self._events("open|save|os.mkdir|sync"):
            yield f"full disk {number}", partial(self._event, "full disk", number, events.full_at)

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
            self.world.run(self.world.command(stopped / "out"), stopped / "said", events.kill_at(stopped, at))
        work = work_folder(stopped / "out")
        names = [p.relative_to(stopped) for p in sorted(work.rglob("*")) if p.is_file() and p.name != ".lock"]
        every = [(name, damage) for name in names for damage in DAMAGES]
        random.Random(self.seed).shuffle(every)
        for name, damage in every:
            yield f"{damage} {plain(str(name))}", partial(self._damage, work, name, damage)

    def _signal(self, number: signal.Signals, draw: random.Random, out: Path) -> Trial:
        """At a moment of the run's usual time; of a run that had ended by then, at an earlier one."""
        moment, said = draw.uniform(0, self.seconds), out.with_name("said")
        while True:
            started = time.monotonic()
            child = self.world.start(self.world.command(out), said)
            time.sleep(moment)
            over = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            os.kill(child, number)
            ended = end(child, said, started)
            if not over:
                break
            moment *= EARLIER
            shutil.rmtree(out)
        return self._judge("a signal at a random moment", f"{number.name} {moment / self.seconds:.3f}", out, ended)

    def _cut(self, number: int, draw: random.Random, out: Path) -> Trial:
        size = draw.choice([0, 1, 100, 1000, 20_000])
        return self._event("writes cut short", number, partial(events.cut_at, size=size), draw, out)

    def _damage(self, work: Path, name: Path, damage: str, draw: random.Random, out: Path) -> Trial:
        shutil.copytree(work, work_folder(out))
        what = harm(out.parent / name, damage, draw)
        ended = self.world.run(self.world.command(out, "--resume"), out.with_name("said"))
        return self._judge_damage(f"a file {damage}", f"{name}{what}", out, ended)

    def _event(self, kind: str, number: int, fault: Callable[..., Fault], draw: random.Random, out: Path) -> Trial:
        ended = self.world.run(self.world.command(out), out.with_name("said"), fault(out.parent, number))
        return self._judge(kind, f"{number}: {self.events[number - 1]}", out, ended)

    def _events(self, kinds: str) -> list[int]:
        """Numbers of all events of these kinds, in a drawn order, so that the first ones are a fair sample."""
        every = [n for n, kind in enumerate(self.events, 1) if re.match(kinds, kind)]
        return random.Random(f"{self.seed} {kinds}").sample(every, len(every))

    def _judge(self, kind: str, what: str, out: Path, ended: Ended) -> Trial:
        found, wrong, before = [ended], wrong_of(ended, out), trained(out)
        for _ in range(ATTEMPTS):
            if ended.code == 0 and weights_of(out):
                break
            ended = self._go_on(out, found)
            wrong = wrong or wrong_of(ended, out)
            if "stopped" not in ended.said and trained(out) < before and not out.exists():
                wrong = wrong or "lost: a checkpoint is gone"
        return self._outcome(kind, what, wrong, out, found)

    def _judge_damage(self, kind: str, what: str, out: Path, ended: Ended) -> Trial:
        """A damaged file makes no difference, or is named with what to delete; without that the run goes on."""
        path, found = Path(what.split(" ")[0]), [ended]
        names = (path.name, f"/{path.parent.name}/") if path.name == "sums.json" else (path.name,)
        if ended.code != 2 or not any(name in ended.said for name in names):  # of sums, their folder is
            return self._outcome(kind, what, wrong_of(ended, out), out, found)
        for _ in range(ATTEMPTS):
            if ended.code == 0 or not delete_what_is_told(ended.said, out.parent):
                break
            ended = self._go_on(out, found)
        trial = self._outcome(kind, what, wrong_of(ended, out), out, found)
        return trial._replace(outcome="named") if trial.outcome == "same" else trial

    def _go_on(self, out: Path, found: list[Ended]) -> Ended:
        found.append(self.world.run(self.world.command(out, "--resume", "auto"), out.with_name("said again")))
        return found[-1]

    def _outcome(self, kind: str, what: str, wrong: str, out: Path, found: list[Ended]) -> Trial:
        made = weights_of(out)
        if not wrong and not made:
            wrong = "lost: it does not go on"
        if not wrong and made != self.wanted:
            wrong = "different"
        if not wrong and (rest := sorted(p.name for p in out.parent.iterdir() if not p.name.startswith("said"))) != [
            "out"
        ]:
            wrong = f"left behind: {rest}"
        if not wrong and any(ended.unclear for ended in found):
            wrong = "unclear"
        said = [f"[{ended.code}] {ended.said[-2000:] if wrong else last_line(ended.said)}" for ended in found]
        return Trial(kind, what, wrong or "same", " | ".join(said))

    def _add(self, name: str, found: dict[str, Any]) -> None:
        self.results.add(name, found)
        trial = Trial(**found)
        if trial.outcome not in FINE:
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


def _found(trial: Callable[[random.Random, Path], Trial], draw: random.Random, place: Path) -> dict[str, Any]:
    return trial(draw, place / "out")._asdict()


def wrong_of(ended: Ended, out: Path) -> str:
    """What a process did or left that it must not, empty for nothing."""
    if ended.code == forks.HANGS:
        return "lost: it hangs"
    return "left behind: a process" if ended.left else half_written(out)


def plain(event: str) -> str:
    """An event or a path without the part of a draft's name that is random or the process's, so that runs can be
    compared."""
    return re.sub(r"(\.saving-|\.[\w.]+\.)([a-z0-9_]{8}(?=/|$)|\d+$)", r"\1*", event)


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


def delete_what_is_told(said: str, place: Path) -> bool:
    """Deletes the file or folder of ``place`` that an error says to delete; whether it said so."""
    told = re.search(r"delete '([^']+)'", said)
    if told is None or place not in Path(told[1]).parents:
        return False
    if Path(told[1]).is_dir():
        shutil.rmtree(told[1])
    else:
        Path(told[1]).unlink()
    return True


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
    return (text.strip().splitlines() or [""])[-1][-120:]
