"""Inputs that a user can type or a disk can hold: refused by one line that names them, or taken where they are valid.

Each case is a command of its own. Text is too short to train on, so that a command whose other inputs are all valid
ends with the words of ``SHORT``, and nothing is trained.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import forks
from benchmarks.faults.results import Results
from benchmarks.faults.world import Ended, World

SHORT = r"fewer than one sequence"
ANY = r"error: |Error"  # of a refusal that need not name more
SECONDS = 120  # after which a command hangs
AS_WANTED = ("refused", "valid")
NOBODY = 65534  # user whom permissions hold back; root they do not


class Case(NamedTuple):
    """One input, and what must come of it."""

    area: str
    name: str
    make: Callable[[Path, InputWorld], list[str]]
    """Puts what it needs into an empty folder and gives the command."""
    wanted: str | None = ""
    """A pattern that its one line of refusal has; None for a command that must succeed."""
    may_be_valid: bool = False
    """Whether it may succeed, too."""
    held_back: bool = False
    """Whether it runs as a user without rights."""


class InputWorld(World):
    """With a saved model, and text that is too short to train on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        (self.folder / "short").mkdir()
        (self.folder / "short" / "a.txt").write_text("short")
        self.teacher, self.model = self.folder / "teacher", self.folder / "model"
        self.short = self.folder / "short"
        for path in self.teacher.iterdir():
            path.chmod(0o644)
        codecs.lookup("utf-8-sig")  # now, for Python may lie where a user without rights cannot load it
        words = ["convert", str(self.teacher), "--preset", "plain", "--out", str(self.model)]
        made = self.run(words, self.folder / "said")
        if made.code:
            raise RuntimeError(f"no model could be made: {made.said[-2000:]}")

    def linearize(self, folder: Path, *more: object, data: object = None, teacher: object = None) -> list[str]:
        """A command that would train one step, if there were text for it."""
        read = ["--data", self.short if data is None else data]
        steps = ["--preset", "plain", "--stage1-steps", 1, "--stage2-steps", 0, "--device", "cpu"]
        size = [] if "--seq-len" in more or "--show-recipe" in more else ["--seq-len", 64]
        out = [] if "--out" in more else ["--out", folder / "out"]
        start = self.teacher if teacher is None else teacher
        return [str(part) for part in ("linearize", start, *read, *steps, *size, *out, *more)]


class Found(NamedTuple):
    """A case and its outcome: "refused" or "valid", or what went wrong; and what was said."""

    area: str
    name: str
    outcome: str
    said: str


def judge(case: Case, ended: Ended, folder: Path) -> str:
    """The outcome of a case's command."""
    lines = [line for line in ended.said.strip().splitlines() if line.strip()]
    if ended.code == forks.HANGS:
        return "hangs"
    if ended.unclear or ended.code < 0:
        return "traceback"
    if ended.code == 0:
        return "valid" if case.wanted is None or case.may_be_valid else "taken"
    if case.wanted is None:
        return "refused wrongly"
    if ended.left or (folder / "out").is_dir() or (folder / "out.training").exists():
        return "left behind"
    errors = [line for line in lines if line.startswith("error: ")]
    usage = any("Usage: " in line or "─ Error ─" in line for line in lines)  # of the command line itself
    text = " ".join(lines) if usage or case.area == "recipes" else "".join(errors)
    one = usage or (errors and (len(errors) == 1 or case.area == "recipes") and lines[-1] == errors[-1])
    return "refused" if one and re.search(case.wanted, text.replace("│", ""), re.DOTALL) else "unclear"


class InputCampaign:
    """All cases, or some, one after the other, each in a process of its own."""

    def __init__(self, folder: Path, say: Callable[[str], None], results: Results) -> None:
        self.world, self.say, self.results = InputWorld(folder), say, results

    @property
    def found(self) -> list[Found]:
        """What came of every case, those of earlier runs too."""
        return [Found(**found) for found in self.results.found.values()]

    def go(self, cases: list[Case], again: bool = False) -> None:
        """Runs and judges those without a result. again: those whose result is not as wanted, too."""
        for case in cases:
            known = self.results.found.get(key(case))
            if known and not (again and known["outcome"] not in AS_WANTED):
                continue
            folder = self.world.folder / "case"
            folder.mkdir()
            try:
                self._try(case, folder)
            finally:
                _remove(folder)

    def _try(self, case: Case, folder: Path) -> None:
        command, said = case.make(folder, self.world), self.world.folder / "said"

        def limits() -> None:
            os.chdir(folder)
            os.environ["HF_HUB_OFFLINE"] = "1"
            if case.held_back and os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)

        folder.chmod(0o777 if not case.held_back else stat.S_IMODE(folder.stat().st_mode) | 0o055)
        ended = self.world.run(command, said, limits, SECONDS)
        outcome = judge(case, ended, folder)
        self.results.add(key(case), Found(case.area, case.name, outcome, ended.said[-600:])._asdict())
        if outcome not in AS_WANTED:
            self.say(f"{outcome}: {case.area}, {case.name}: {ended.said.strip()[-600:]}")

    def table(self) -> str:
        """By area: cases, and how many ended in which way."""
        columns = ("refused", "valid", "traceback", "taken", "refused wrongly", "unclear", "left behind", "hangs")
        head = ("inputs", "cases", "refused by one line", "valid, and taken", *columns[2:])
        rows = ["| " + " | ".join(head) + " |", "|---|" + "---|" * 9]
        for area in [*dict.fromkeys(found.area for found in self.found), ""]:
            counts = Counter(found.outcome for found in self.found if area in ("", found.area))
            rows.append(f"| {area or 'all'} | {counts.total()} | " + " | ".join(str(counts[c]) for c in columns) + " |")
        return "\n".join(rows)


def _remove(folder: Path) -> None:
    for path, names, _ in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                (Path(path) / name).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def key(case: Case) -> str:
    """What a case is called among the results."""
    return f"{case.area}: {case.name}"


def all_cases() -> list[Case]:
    """Every case, in the order of areas; names are unique in an area."""
    from benchmarks.faults.input_cases import AREAS

    cases = [case for area in AREAS for case in area()]
    assert len({(case.area, case.name) for case in cases}) == len(cases)
    return cases


def sample(cases: list[Case], count: int) -> Iterator[Case]:
    """As many cases, evenly over all."""
    return (cases[i * len(cases) // count] for i in range(min(count, len(cases))))
