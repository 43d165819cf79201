"""Does this checkout cost more than another commit? Both are measured here and now, in turn: A B B A A B.

    python -m benchmarks.regressions [--base HEAD^] [--out FILE.json]

Cases are those of the asv suites named in ``CASES``, run by this checkout's suites on either's packages. One process
imports the large libraries and forks for each run, so that all of it takes some twenty seconds.

- **Counts** (operators, Python functions, launches, bytes at the peak) have no noise: one more is a regression.
- **Times** are those of the thread. A regression is where every run of this checkout is slower by more than ``MARGIN``
  than every run of the other, six runs in all, and again in another six of the cases that were.

Ends with 1 where there is a regression that no commit since the base has announced: a line ``slower: PATTERN`` of its
message, followed by why, lets cases pass whose names fit the pattern (``*`` for anything). A case that the base cannot
run is named and not judged; one that this checkout cannot run fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from time import thread_time
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("lizard_ops", "lizard_layers", "lizard_models")
LIBRARIES = ("torch", "triton", "transformers.models.llama.modeling_llama", "transformers.generation", "peft")
MARGIN = 1.10
TURNS = "ABBAAB"
COUNTS = ("calls", "bytes")  # units of what has no noise
TIME_CALLS = 9  # of a case whose name begins with time_: the median


class Case(NamedTuple):
    """A benchmark of a suite with its parameters."""

    module: str
    suite: str
    method: str
    parameters: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.module}.{self.suite}.{self.method}({', '.join(map(str, self.parameters))})"


HOST = [
    Case("host", "HostOfALayer", method, ("lizard", kind))
    for kind in ("prefill", "train", "decode")
    for method in ("track_operators", "track_python_calls", "track_triton_launches", "track_host_time")
]
CASES = [
    *HOST,
    Case("host", "Generate", "track_token", ("lizard", 64)),
    Case("ops", "Decode", "time_step"),
    Case("ops", "ForwardBackward", "time_forward_backward", ("hybrid", 512)),
    Case("ops", "ForwardBackward", "track_peak_memory", ("hybrid", 512)),
]
Found = dict[str, dict[str, Any]]  # by case: {"value": number, "unit": text} or {"error": text}


def measure(case: Case, package: str) -> dict[str, Any]:
    """One case in this process."""
    suite = getattr(importlib.import_module(f"{package}.{case.module}"), case.suite)()
    method = getattr(suite, case.method)
    getattr(suite, "setup", lambda *_: None)(*case.parameters)
    try:
        if not case.method.startswith("time_"):
            return {"value": method(*case.parameters), "unit": getattr(method, "unit", "")}
        times = []
        for _ in range(TIME_CALLS + 1):  # the first is not counted
            start = thread_time()
            method(*case.parameters)
            times.append(thread_time() - start)
        return {"value": 1e3 * sorted(times[1:])[TIME_CALLS // 2], "unit": "milliseconds"}
    finally:
        getattr(suite, "teardown", lambda *_: None)(*case.parameters)


def measured(checkout: Path, cases: Iterable[Case], suites: Path, package: str = "asv_suite") -> Found:
    """The cases on the packages of a checkout, in a fork of this process, which must not have imported them.

    suites: the folder that holds the package of suites. A case that fails has its error.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            try:
                sys.path[:0] = [str(checkout), str(suites)]
                found: Found = {}
                for case in cases:
                    try:
                        found[case.name] = measure(case, package)
                    except Exception as error:
                        found[case.name] = {"error": f"{type(error).__name__}: {error}"}
                json.dump(found, output)
                output.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        output.seek(0)
        text = output.read()
    return json.loads(text) if text else {case.name: {"error": "the process has ended"} for case in cases}


def in_turn(base: Path, cases: Sequence[Case], suites: Path) -> dict[str, list[Found]]:
    """Runs of both checkouts: A the base, B this one. Counts are in the first run of each alone."""
    runs: dict[str, list[Found]] = {"A": [], "B": []}
    for turn in TURNS:
        before = {name: one for found in runs[turn] for name, one in found.items()}
        due = [case for case in cases if before.get(case.name, {}).get("unit") not in COUNTS]
        runs[turn].append(measured(base if turn == "A" else ROOT, due, suites))
    return runs


def verdict(name: str, runs: dict[str, list[Found]]) -> dict[str, Any]:
    """What the runs say of a case: same, better, slower, or why it cannot be told."""
    found = {turn: [run[name] for run in runs[turn] if name in run] for turn in "AB"}
    for turn, state in (("B", "broken"), ("A", "not in the base")):
        error = next((one["error"] for one in found[turn] if "error" in one), None)
        if error is not None:
            return {"state": state, "error": error}
    base, here = ([one["value"] for one in found[turn]] for turn in "AB")
    unit = found["B"][0]["unit"]
    margin = 1.0 if unit in COUNTS else MARGIN
    state = "slower" if min(here) > margin * max(base) else "better" if min(base) > margin * max(here) else "same"
    return {"state": state, "unit": unit, "base": base, "here": here}


def judged(base: Path, cases: Sequence[Case], suites: Path) -> dict[str, dict[str, Any]]:
    """The verdict of every case; times that seem slower are measured again."""
    runs = in_turn(base, cases, suites)
    found = {case.name: verdict(case.name, runs) for case in cases}
    doubted = [case for case in cases if found[case.name]["state"] == "slower"]
    doubted = [case for case in doubted if found[case.name]["unit"] not in COUNTS]
    if doubted:
        again = in_turn(base, doubted, suites)
        for case in doubted:
            second = verdict(case.name, again)
            found[case.name] = second | {"first": found[case.name]}
    return found


def git(*arguments: str, root: Path = ROOT) -> bytes:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True).stdout


def extract(commit: str, folder: Path, root: Path = ROOT) -> None:
    """The packages as they are in a commit."""
    listed = git("ls-tree", "--name-only", commit, root=root).decode().split()
    with tarfile.open(
        fileobj=io.BytesIO(git("archive", commit, *(n for n in PACKAGES if n in listed), root=root))
    ) as t:
        t.extractall(folder, filter="data")


def announced(base: str, root: Path = ROOT) -> list[str]:
    """The patterns of ``slower:`` lines in the messages of the commits since the base."""
    lines = git("log", "--format=%B", f"{base}..HEAD", root=root).decode().splitlines()
    return [words.split()[1] for words in lines if words.lower().startswith("slower: ") and len(words.split()) > 1]


def fails(found: dict[str, dict[str, Any]], patterns: Iterable[str]) -> list[str]:
    """The cases that are slower and not announced, or broken."""
    patterns = list(patterns)
    return [
        name
        for name, one in found.items()
        if one["state"] == "broken"
        or (one["state"] == "slower" and not any(fnmatchcase(name, pattern) for pattern in patterns))
    ]


def show(found: dict[str, dict[str, Any]], failed: Sequence[str]) -> None:
    for name, one in found.items():
        mark = "FAILS" if name in failed else one["state"] + (" (announced)" if one["state"] == "slower" else "")
        if "error" in one:
            print(f"{mark:16} {name}: {one['error']}")
            continue
        form = "{:.0f}" if one["unit"] in COUNTS else "{:.3g}"
        values = (", ".join(form.format(x) for x in sorted(set(one[side]))) for side in ("base", "here"))
        print(f"{mark:16} {name}: {' -> '.join(values)} {one['unit']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD^", help="the commit to compare with")
    parser.add_argument("--only", default="*", help="cases whose names fit")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    try:
        base = git("rev-parse", "--verify", f"{options.base}^{{commit}}").decode().strip()
    except subprocess.CalledProcessError:
        print(f"--base {options.base}: no commit of this repository; fetch it, or name another", file=sys.stderr)
        return 2
    cases = [case for case in CASES if fnmatchcase(case.name, options.only)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # and no pool of threads that a fork would lack
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        extract(base, Path(folder))
        found = judged(Path(folder), cases, ROOT / "benchmarks")
    failed = fails(found, announced(base))
    show(found, failed)
    if options.out:
        options.out.write_text(json.dumps({"base": base, "cases": found, "fails": failed}, indent=1) + "\n")
    print(f"{len(failed)} of {len(found)} cases cost more than at {base[:7]}" if failed else f"no more than {base[:7]}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
