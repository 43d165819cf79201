"""Runs of stage 2 in several processes of which one is killed in the middle of step 3, and gone on with in 1, 2 and 4.

All are forks of this one, with the environment that torchrun gives. Prints a line of JSON for each: how they ended,
after how many seconds, and the losses and the sum of the parameters that the main process found.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from parallel_run import one_run
from training import fresh, recipes

from benchmarks.faults.ranks import kill_at
from lizard_models.distill.stage2 import FineTuning

SECONDS = 90  # after which a process hangs


def processes(count: int, way: str, folder: Path, killed: str = "", resume: bool = False) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began, started, found = time.monotonic(), [], folder / "found.json"
    for rank in range(count):
        started.append(os.fork())
        if started[-1] == 0:
            signal.alarm(SECONDS)
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in {**where, "MASTER_PORT": port}.items()}
            os._exit(worker(rank, way == "fsdp" and count > 1, folder, killed, resume))
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    told = {"way": way, "processes": count, "killed": killed, "codes": codes, "seconds": time.monotonic() - began}
    print(json.dumps(told | (json.loads(found.read_text()) if found.exists() else {})), flush=True)


def worker(rank: int, fsdp: bool, folder: Path, killed: str, resume: bool) -> int:
    try:
        if killed:
            kill_at(killed)
        losses, parameters = one_run(2, folder / "stage2", fsdp=fsdp, save_steps=1, resume=resume)
        if rank == 0:
            total = sum(p.double().abs().sum().item() for p in parameters.values())
            (folder / "found.json").write_text(json.dumps({"losses": losses, "sum": total}))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = fresh()
    FineTuning(model, recipes(model)[1])  # what the first adapters of a process import, once for all of them
    gc.freeze()  # every Trainer collects; see tests/conftest.py
    (folder / "whole").mkdir()
    processes(1, "whole", folder / "whole")
    for way, killed in (("ddp", "1:2:3"), ("fsdp", "0:2:3")):
        stopped = folder / way
        stopped.mkdir()
        processes(2, way, stopped, killed)
        for then in (1, 2, 4):
            again = shutil.copytree(stopped, folder / f"{way}-{then}")
            processes(then, way, again, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
