"""Runs the fuzz long: ``python -m tests.models.fuzz --examples 2000 --seed 1``."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def told(error: Exception) -> str:
    """The error, the smallest calls that lead to it, and where in this repository it was raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    lines = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
    return "\n".join(lines + [f"  {Path(f.filename).name}:{f.lineno} {f.line}" for f in frames])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.models.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="sequences of calls in all")
    parser.add_argument("--steps", type=int, default=25, help="rules a sequence")
    parser.add_argument("--seed", type=int, default=1, help="of the first batch of sequences; the others count on")
    parser.add_argument("--batch", type=int, default=25, help="sequences a seed: after a find the next seed goes on")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--shrink", type=float, default=60, help="seconds to look for a smaller sequence after a find")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile(backend='eager') among the calls")
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME", help="draw these of subjects.py alone")
    parser.add_argument("--plant", default="", help="a fault of planted.py, which must be found")
    asked = parser.parse_args()

    from subjects import OPTIONS

    if unknown := set(asked.models) - set(OPTIONS):
        parser.error(f"--models: got {', '.join(sorted(unknown))}, wanted some of {', '.join(OPTIONS)}")
    for name in set(OPTIONS) - set(asked.models) if asked.models else ():
        del OPTIONS[name]  # before the machine, which draws from them, is imported

    from machine import CALLS
    from planted import PLANTED
    from run import run
    from traced import Traced
    from whole import Fuzz

    machine = Traced if asked.compiled else Fuzz
    if asked.plant:
        PLANTED[asked.plant](pytest.MonkeyPatch())
    started, found, done = time.monotonic(), 0, 0
    for seed in range(asked.seed, asked.seed + -(-asked.examples // asked.batch)):
        if time.monotonic() - started > 60 * asked.minutes:
            break
        try:
            run(asked.batch, asked.steps, seed, machine, asked.shrink)
        except Exception as error:
            found += 1
            print(f"--- seed {seed}\n{told(error)}", flush=True)
            if asked.plant:
                break
        done += asked.batch
        print(
            f"{time.monotonic() - started:.0f} s, seed {seed}, {done} examples, {found} finds: {dict(CALLS)}",
            flush=True,
        )
    return bool(found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
