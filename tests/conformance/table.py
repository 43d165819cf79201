"""Run the conformance suite and transformers' own tests of its peers, and print the counts side by side.

LIZARD_TRANSFORMERS_TESTS=CHECKOUT python tests/conformance/table.py FOLDER

FOLDER keeps a junit file for each class. What is there already is not run again, so that a run that was cut short goes
on; with ``--only-read`` nothing is run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

import transformers_checkout
from variants import VARIANTS

PEERS = {"Llama": "llama", "Mamba2": "mamba2", "Bamba": "bamba", "Qwen3Next": "qwen3_next"}
PEER, OURS = "transformers' own ", "Lizard"
OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--timeout", "1800"]
KINDS = ("passed", "failed", "listed", "skipped")
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}


def commands(checkout: Path) -> dict[str, tuple[list[str], Path]]:
    """What is run for every class, and where."""
    here = Path(__file__).resolve().parent
    own = {f"{OURS}{name}": ([str(here), "-k", f"{name}Test"], here.parents[1]) for name in VARIANTS}
    peers = {
        PEER + name: ([f"tests/models/{folder}/test_modeling_{folder}.py", "-k", f"{name}ModelTest"], checkout)
        for name, folder in PEERS.items()
    }
    return peers | own


def outcome(case: ElementTree.Element) -> str:
    """One of ``KINDS``, for a test with all of its subtests."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skips = case.findall("skipped")
    if any(skip.get("type") == "pytest.xfail" for skip in skips):
        return "listed"
    return "skipped" if skips else "passed"


def outcomes(file: Path) -> dict[str, str]:
    """Outcome of every test of a class; functions beside it are left out."""
    cases = ElementTree.parse(file).iter("testcase")
    return {case.get("name", ""): outcome(case) for case in cases if case.get("classname", "").endswith("Test")}


def rows(results: dict[str, dict[str, str]]) -> Iterable[str]:
    """The table in Markdown. ``of Llama's`` counts what a class passes of the tests that transformers' Llama passes."""
    llama = {test for test, kind in results.get(PEER + "Llama", {}).items() if kind == "passed"}
    yield f"| class | tests | {' | '.join(KINDS)} | of Llama's {len(llama)} |"
    yield "|---|" + "---|" * (len(KINDS) + 2)
    for name, tests in results.items():
        counts = [sum(kind == wanted for kind in tests.values()) for wanted in KINDS]
        shared = sum(tests.get(test) == "passed" for test in llama)
        yield f"| {name} | {len(tests)} | {' | '.join(map(str, counts))} | {shared} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only-read", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    checkout = transformers_checkout.checkout()
    if checkout is None:
        parser.error(f"{transformers_checkout.VARIABLE} is not set: wanted the root of a checkout of transformers")
    results = {}
    for name, (command, folder) in commands(checkout).items():
        file = arguments.folder.resolve() / f"{name.replace(PEER, 'peer-')}.xml"
        if not file.exists() and not arguments.only_read:
            start = time.monotonic()
            called = [sys.executable, "-m", "pytest", *OPTIONS, *command, f"--junitxml={file}.part"]
            log = subprocess.run(called, cwd=folder, env=os.environ | OFFLINE, capture_output=True, text=True)
            file.with_suffix(".txt").write_text(log.stdout + log.stderr)
            Path(f"{file}.part").rename(file)
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
        if file.exists():
            results[name] = outcomes(file)
    print("\n".join(rows(results)))


if __name__ == "__main__":
    main()
