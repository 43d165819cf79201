"""``python -m benchmarks.faults --workers 2 --out faults.jsonl``: what runs lose under faults, as a table.

Without options it is the whole campaign. With ``--out`` the same command again goes on with the trials that are left.

Each trial is a small linearization in a process of its own, with one fault; then its command with ``--resume auto``
until it is done. The model must be that of a run without faults, bit for bit. Processes are forks of this one, which
has imported the libraries; with ``--fresh`` they are started as a user starts them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults import inputs as input_campaign
from benchmarks.faults.campaign import Campaign
from benchmarks.faults.results import Results, differing

KINDS = ("signals", "kills", "full_disks", "cuts", "files")
EVERY = sys.maxsize


def main() -> None:
    """The campaign that the first word names: ``inputs``, ``ranks``, else faults of runs."""
    if sys.argv[1:2] == ["inputs"]:
        return inputs(sys.argv[2:])
    if sys.argv[1:2] == ["ranks"]:
        return ranks(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--signals", type=int, default=100, help="trials with a signal at a random moment")
    parser.add_argument("--kills", type=int, default=EVERY, help="with SIGKILL at an event of the file system")
    parser.add_argument("--full-disks", type=int, default=EVERY, help="with a disk that is full from a write on")
    parser.add_argument("--cuts", type=int, default=EVERY, help="with files cut in the middle from a write on")
    parser.add_argument("--files", type=int, default=EVERY, help="with a file of a stopped run damaged")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no other trial begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for a line of JSON a trial; trials that it has are left out")
    parser.add_argument("--again", action="store_true", help="run trials again that were not as wanted")
    parser.add_argument("--workers", type=int, default=1, help="trials at the same time")
    parser.add_argument("--fresh", action="store_true", help="processes that import everything themselves")
    parser.add_argument("--beside", type=Path, help="results of the same trials elsewhere, to compare with")
    asked = parser.parse_args()
    started = time.monotonic()

    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:.0f} s] {message}", flush=True)

    with _folder("faults-") as folder:
        campaign = Campaign(folder, asked.seed, say, asked.out, asked.fresh, asked.workers)
        campaign.go({kind: getattr(asked, kind) for kind in KINDS}, asked.minutes, asked.again)
    print(campaign.table())
    if asked.beside is not None:
        both, other = differing(campaign.results, asked.beside)
        print(f"{both} of these trials are in {asked.beside} too, with another outcome: {other or 'none'}")


def inputs(words: list[str]) -> None:
    """``python -m benchmarks.faults inputs``: what a user can type and a disk can hold, as a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults inputs", description=input_campaign.__doc__)
    parser.add_argument("--count", type=int, help="as many cases, evenly over all; default: all")
    parser.add_argument("--area", help="cases of one area")
    parser.add_argument("--out", type=Path, help="file for a line of JSON a case; cases that it has are left out")
    parser.add_argument("--again", action="store_true", help="run cases again that were not as wanted")
    asked = parser.parse_args(words)
    cases = [case for case in input_campaign.all_cases() if asked.area in (None, case.area)]
    with _folder("inputs-") as folder:
        folder.chmod(0o755)
        results = Results(asked.out, {"campaign": "inputs"})
        campaign = input_campaign.InputCampaign(folder, lambda message: print(message, flush=True), results)
        campaign.go(list(input_campaign.sample(cases, asked.count or len(cases))), asked.again)
    print(campaign.table())


def ranks(words: list[str]) -> None:
    """``python -m benchmarks.faults ranks``: runs in several processes of which one is killed, as a table."""
    from benchmarks.faults.ranks import RankCampaign

    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults ranks", description=ranks.__doc__)
    parser.add_argument("--ways", default="ddp,fsdp", help="how the model is spread")
    parser.add_argument("--then", default="1,2,4", help="processes that go on")
    parser.add_argument("--out", type=Path, help="file for every trial as JSON")
    asked = parser.parse_args(words)
    with _folder("ranks-") as folder:
        campaign = RankCampaign(folder, lambda message: print(message, flush=True))
        campaign.go(tuple(asked.ways.split(",")), tuple(map(int, asked.then.split(","))))
        if asked.out is not None:
            campaign.save(asked.out)
    print(campaign.table())


@contextlib.contextmanager
def _folder(prefix: str) -> Iterator[Path]:
    """A folder that is gone afterwards. The one of tempfile goes with the first fork that ends, too."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
