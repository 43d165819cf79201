"""Run the tests once for each change, in copies of the tree, and record what they said."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.mutants.areas import ROOT, asked_about
from benchmarks.mutants.changes import Change

COPIED = ("lizard_ops", "lizard_layers", "lizard_models", "benchmarks", "tests", "docs", "examples")
COPIED_FILES = ("pyproject.toml", "README.md", "CHANGELOG.md", "constraints.txt")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """state: "killed", "timeout" (counted as killed) or "survived". by: the test that failed. seconds: of the tests."""

    area: str
    change: Change
    state: str
    by: str
    seconds: float

    def line(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def read(cls, line: str) -> Verdict:
        fields = json.loads(line)
        return cls(**{**fields, "change": Change(**fields["change"])})


def recorded(record: Path) -> list[Verdict]:
    return [Verdict.read(line) for line in record.read_text().splitlines()] if record.exists() else []


class Campaign:
    """Workers, each with a copy of the tree.

    deselected: the tests that fail without any change. nearest: ask only those nearest to a file. tests: files of
    tests that are asked in place of those near to a file.
    """

    def __init__(
        self, record: Path, workers: int, limit: float, deselected: Sequence[str] = (), nearest: bool = False,
        tests: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.record, self.workers, self.limit, self.deselected = record, workers, limit, tuple(deselected)
        self.groups, self.tests = 1 if nearest else 2, list(tests)
        self.lock = threading.Lock()
        self.kills: collections.Counter[str] = collections.Counter()
        self.idle: queue.Queue[Worker] = queue.Queue()

    def run(self, todo: Iterable[tuple[str, Change]], until: float) -> None:
        """Test every change that the record lacks, until the time (of time.monotonic) is over."""
        done = {verdict.change.name for verdict in recorded(self.record)}
        self.kills.update(verdict.by.partition("::")[0] for verdict in recorded(self.record))
        todo = [(area, change) for area, change in todo if change.name not in done]
        with tempfile.TemporaryDirectory() as folder:
            started = [Worker(Path(folder) / str(number)) for number in range(self.workers)]
            for worker in started:
                self.idle.put(worker)
            try:
                with ThreadPoolExecutor(self.workers) as pool:
                    for future in [pool.submit(self.test, area, change, until) for area, change in todo]:
                        future.result()
            finally:
                for worker in started:
                    worker.close()

    def test(self, area: str, change: Change, until: float) -> None:
        if time.monotonic() > until:
            return
        worker = self.idle.get()
        file = worker.tree / change.file
        whole = file.read_text()
        try:
            file.write_text(change.apply(whole))
            began = time.monotonic()
            state, by = "survived", ""
            groups = (self.tests,) if self.tests else asked_about(area, change.file, self.kills)[: self.groups]
            for tests in groups:
                state, by = self.ask(worker, tests, until)
                if state != "survived":
                    break
        finally:
            file.write_text(whole)
            self.idle.put(worker)
        if state == "unfinished":
            return
        verdict = Verdict(area, change, state, by, round(time.monotonic() - began, 1))
        with self.lock, self.record.open("a") as stream:
            self.kills[by.partition("::")[0]] += 1
            stream.write(verdict.line() + "\n")
            print(f"{state:9s} {verdict.seconds:6.1f} s  {change.name}  {by}", flush=True)

    def ask(self, worker: Worker, tests: Sequence[str], until: float) -> tuple[str, str]:
        """What pytest says, and the first test that failed: the two files most likely to, then the others."""
        for part in filter(None, (tests[:2], tests[2:])):
            arguments = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "--tb=no", "-rfE"]
            arguments += [f"--timeout={self.limit:g}", *part, *(leave_out(name) for name in self.deselected)]
            code, said = worker.ask(arguments, max(1, min(20 * self.limit, until - time.monotonic())))
            if code is None:
                return ("unfinished", "") if time.monotonic() >= until else ("timeout", "")
            failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
            if "Timeout" in said and not failed:
                return "timeout", ""
            if code not in (0, 5):
                return "killed", failed[1] if failed else f"exit {code}"
        return "survived", ""


class Worker:
    """A copy of the tree, and a process that runs its tests (``zygote.py``)."""

    def __init__(self, tree: Path) -> None:
        self.tree = copy_of_the_tree(tree)
        kept = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1")
        kept.update(TRITON_INTERPRET="1", HF_HUB_OFFLINE="1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.mutants.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept, cwd=tree,
        )  # fmt: skip

    def ask(self, arguments: Sequence[str], seconds: float) -> tuple[int | None, str]:
        """pytest's exit code, None past the limit, and its output."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(
            json.dumps({"tree": str(self.tree), "arguments": arguments, "seconds": seconds}) + "\n"
        )
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["said"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def leave_out(name: str) -> str:
    """The option for a test, or for a file that cannot even be read: that would count as a kill where it is asked."""
    return f"--deselect={name}" if "::" in name else f"--ignore={name}"


def path_of(tree: Path) -> str:
    """This tree before whatever else Python is to look through."""
    return os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH", "")]))


def copy_of_the_tree(target: Path) -> Path:
    target.mkdir(parents=True)
    for name in COPIED:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for name in COPIED_FILES:
        shutil.copy(ROOT / name, target / name)
    return target


def failing_without_change(tests: Sequence[str], workers: int, limit: float) -> list[str]:
    """The tests that fail on this machine as they are, as for want of a package: they cannot tell a change."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
    command += ["--tb=no", "-rfE", f"--timeout={limit:g}", *tests]
    if workers > 1:
        command += ["-n", str(workers)]
    kept = dict(
        os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=path_of(ROOT), TRITON_INTERPRET="1"
    )
    said = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True).stdout
    print(said[-1500:], flush=True)
    return sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)))
