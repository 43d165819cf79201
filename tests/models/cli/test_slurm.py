"""The SLURM script of the documents, with stand-ins for SLURM and torchrun."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[3] / "docs" / "runs.md"
STUBS = {
    "srun": 'exec "$@"',
    "scontrol": 'echo "$@" >> "$SAID"',
    "torchrun": """trap 'echo stopped >> "$SAID"; exit 143' TERM
echo "$@" > "$SAID"
[ -n "$ENDS" ] && exit 0
while :; do sleep 0.02; done""",
}


def begun(folder: Path, ends: str) -> tuple[subprocess.Popen, Path]:
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", DOCUMENT.read_text(), re.S)
    (folder / "job").write_text(script)
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    said = folder / "said"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SAID": str(said), "ENDS": ends, "SLURM_JOB_ID": "7", "SCRATCH": "/s"}
    return subprocess.Popen(["bash", folder / "job"], env=environment), said


def lines(said: Path, count: int) -> list[str]:
    end = time.monotonic() + 30
    while time.monotonic() < end and (not said.exists() or len(said.read_text().splitlines()) < count):
        time.sleep(0.02)
    return said.read_text().splitlines()


@pytest.mark.parametrize("ends", ["", "1"])
def test_the_job_is_queued_again_if_it_is_stopped_and_only_then(tmp_path, ends):
    job, said = begun(tmp_path, ends)
    try:
        (command,) = lines(said, 1)
        assert command == "--standalone --nproc-per-node 8 -m lizard_models run recipe.yaml"
        if not ends:
            job.send_signal(signal.SIGTERM)
        job.wait(30)
    finally:
        job.kill()
    assert said.read_text().splitlines()[1:] == ([] if ends else ["stopped", "requeue 7"])
