"""Launches that are found again give the driver what Triton's own give it, by Triton's own launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from lizard_ops.tiles import launcher

CASE = Path(__file__).with_name("launcher_case.py")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch has loaded the driver whose place this one would take")
@pytest.mark.skipif(not launcher.TAKES_ADDRESSES, reason="this Triton launches every kernel itself")
def test_the_driver_is_given_the_same(tmp_path):
    from launcher_case import SOURCE

    (tmp_path / "driver.c").write_text(SOURCE)
    library = tmp_path / "libcuda.so.1"
    build = ["gcc", "-shared", "-fPIC", "-w", tmp_path / "driver.c", "-o", library, "-Wl,-soname,libcuda.so.1"]
    subprocess.run(build, check=True)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(CASE.parents[2]), env.get("PYTHONPATH", "")])
    env.pop("LIZARD_FOUND_LAUNCHES", None)
    env |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    found = subprocess.run([sys.executable, CASE, tmp_path], env=env, capture_output=True, text=True)
    assert found.stdout.endswith("the same\n"), found.stdout + found.stderr
