"""Run the conformance suite and transformers' own tests of its peers, and print the counts side by side.

LIZARD_TRANSFORMERS_TESTS=CHECKOUT python tests/conformance/table.py FOLDER

FOLDER keeps a junit file and a log for each class. A class that has its file is not run again, so a run that was cut
short goes on; of a test in several files the last one counts. With ``--only-read`` nothing is run.
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
OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--timeout", "1800"]
KINDS = ("passed", "failed", "listed", "skipped")
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
Results = dict[str, dict[str, str]]


def commands(checkout: Path) -> dict[str, tuple[list[str], Path]]:
    """What is run for every test class, and where: the peers first."""
    here = Path(__file__).resolve().parent
    peers = {f"{name}ModelTest": f"tests/models/{folder}/test_modeling_{folder}.py" for name, folder in PEERS.items()}
    return {name: ([file, "-k", name], checkout) for name, file in peers.items()} | {
        f"{name}Test": ([str(here), "-k", f"{name}Test"], here.parents[1]) for name in VARIANTS
    }


def outcome(case: ElementTree.Element) -> str:
    """One of ``KINDS``, for a test with all of its subtests."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skips = case.findall("skipped")
    if any(skip.get("type") == "pytest.xfail" for skip in skips):
        return "listed"
    return "skipped" if skips else "passed"


def outcomes(files: Iterable[Path]) -> Results:
    """Outcome of every test of every class."""
    results: Results = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            name = case.get("classname", "").rpartition(".")[2]
            if name.endswith("Test"):
                results.setdefault(name, {})[case.get("name", "")] = outcome(case)
    return results


def rows(results: Results) -> Iterable[str]:
    """The table in Markdown. Its last column counts what a class passes of the tests that transformers' Llama does."""
    llama = {test for test, kind in results.get("LlamaModelTest", {}).items() if kind == "passed"}
    yield f"| class | tests | {' | '.join(KINDS)} | of Llama's {len(llama)} |"
    yield "|---|" + "---|" * (len(KINDS) + 2)
    for name in [f"{name}ModelTest" for name in PEERS] + [f"{name}Test" for name in VARIANTS]:
        if tests := results.get(name):
            counts = [sum(kind == wanted for kind in tests.values()) for wanted in KINDS]
            shared = sum(tests.get(test) == "passed" for test in llama)
            whose = "transformers' " if name.endswith("ModelTest") else "Lizard "
            title = whose + name.removesuffix("Test").removesuffix("Model")
            yield f"| {title} | {len(tests)} | {' | '.join(map(str, counts))} | {shared} |"


def run(name: str, command: list[str], where: Path, file: Path) -> None:
    """Run one class, with the junit file and, beside it, what it printed."""
    start, part = time.monotonic(), file.with_suffix(".part")
    called = [sys.executable, "-m", "pytest", *OPTIONS, *command, f"--junitxml={part}"]
    done = subprocess.run(called, cwd=where, env=os.environ | OFFLINE, capture_output=True, text=True)
    file.with_suffix(".txt").write_text(done.stdout + done.stderr)
    part.rename(file)
    print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only-read", action="store_true", help="count what is there, run nothing")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if not arguments.only_read:
        checkout = transformers_checkout.checkout()
        if checkout is None:
            parser.error(f"{transformers_checkout.VARIABLE} is not set: wanted the root of a checkout of transformers")
        folder.mkdir(parents=True, exist_ok=True)
        for name, (command, where) in commands(checkout).items():
            if not (file := folder / f"{name}.xml").exists():
                run(name, command, where, file)
    files = sorted(folder.glob("*.xml"), key=lambda file: file.stat().st_mtime)
    print("\n".join(rows(outcomes(files))))


if __name__ == "__main__":
    main()
