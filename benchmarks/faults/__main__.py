"""``python -m benchmarks.faults --signals 100 --kills 100``: what runs lose under faults, as a table.

Each trial is a small linearization in a process of its own, with one fault; then its command with ``--resume auto``
until it is done. The model must be that of a run without faults, bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.faults.campaign import Campaign

KINDS = ("signals", "kills", "full_disks", "files")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--signals", type=int, default=8, help="trials with a signal at a random moment")
    parser.add_argument("--kills", type=int, default=8, help="trials with SIGKILL at an event of the file system")
    parser.add_argument("--full-disks", type=int, default=8, help="trials in which writes fail from an event on")
    parser.add_argument("--files", type=int, default=1, help="times that each file of a stopped run is damaged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for every trial as JSON")
    asked = parser.parse_args()
    started = time.monotonic()

    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:.0f} s] {message}", flush=True)

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        campaign = Campaign(Path(folder), asked.seed, say)
        for kind in KINDS:
            getattr(campaign, kind)(getattr(asked, kind))
            say(f"{kind}: done")
            if asked.out is not None:
                campaign.save(asked.out)
    print(campaign.table())


if __name__ == "__main__":
    main()
