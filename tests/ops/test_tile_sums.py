"""Sums of products over many tiles, as Triton compiles them for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")


def test_float32_tiles_are_summed_from_zero_and_half_ones_from_the_sum(tmp_path):
    """A product that begins from the sum rounds at its size for each of thousands of terms: 1.3 times what the gradient
    of an anchor may be off by. Triton makes of ``acc + dot`` such a product, the interpreter does not show it."""
    called = [sys.executable, str(Path(__file__).with_name("compiled_sums.py"))]
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        called, env=outside | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["ieee zero", "tf32 sum"]
