"""A process of two is killed in the middle of a step: the other ends, and 1, 2 or 4 go on to the same losses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What ``killed_ranks`` printed, by way, processes and whether one was killed."""
    done = subprocess.run(
        [sys.executable, "-m", "killed_ranks", str(tmp_path_factory.mktemp("ranks"))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {(line["way"], line["processes"], bool(line["killed"])): line for line in lines} | {"said": done.stderr}


@pytest.mark.parametrize(("way", "killed"), [("ddp", 1), ("fsdp", 0)])
def test_the_others_end_when_one_is_killed(told, way, killed):
    line = told[way, 2, True]
    assert line["codes"][killed] == -signal.SIGKILL and line["codes"][1 - killed] == 1, told["said"]
    assert line["seconds"] < 60 and "losses" not in line


@pytest.mark.parametrize("then", [1, 2, 4])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_any_number_of_processes_goes_on_to_the_same_losses(told, way, then):
    whole, line = told["whole", 1, False], told[way, then, False]
    assert line["codes"] == [0] * then, told["said"]
    assert [step for step, _ in line["losses"]] == [1, 2, 3, 4]
    assert [loss for _, loss in line["losses"]] == pytest.approx([loss for _, loss in whole["losses"]], rel=1e-4)
    assert line["sum"] == pytest.approx(whole["sum"], rel=1e-6)
