"""Which implementation, device and dtype the properties of the ops are tested in."""

from __future__ import annotations

import dataclasses
import importlib
import os

import pytest
import torch


@dataclasses.dataclass(frozen=True)
class Target:
    """One implementation under test; ``effort`` scales the number of examples."""

    impl: str
    device: str
    dtype: torch.dtype
    effort: float

    def count(self, examples: int) -> int:
        return max(2, round(self.effort * examples))

    def __str__(self) -> str:
        return f"{self.impl}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


CPU = (Target("torch", "cpu", torch.float64, 1.0), Target("torch", "cpu", torch.float32, 0.5))
INTERPRETED = (Target("triton", "cpu", torch.float32, 0.1),)
CUDA = tuple(Target("triton", "cuda", dtype, 0.5) for dtype in (torch.float32, torch.bfloat16, torch.float16))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``target``: every implementation; ``torch_target``: those of the PyTorch path alone."""
    on_gpu = metafunc.config.getoption("--device") == "cuda"
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", CUDA if on_gpu else CPU + INTERPRETED, ids=str)
    if "torch_target" in metafunc.fixturenames:
        metafunc.parametrize("torch_target", () if on_gpu else CPU, ids=str)


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few positions in the PyTorch paths, so that short sequences meet every boundary."""
    if "target" not in request.fixturenames and "torch_target" not in request.fixturenames:
        return
    target = request.getfixturevalue("target" if "target" in request.fixturenames else "torch_target")
    if target.impl == "triton" and target.device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module, name, size in (
        ("gated_attn.chunk_torch", "HEAD_GATE_CHUNK", 8),
        ("gated_attn.chunk_torch", "CHANNEL_GATE_CHUNK", 4),
        ("gated_attn.chunk_torch_tiles", "SCAN", 2),
        ("window_attn.chunk_torch", "BLOCK", 4),
    ):
        monkeypatch.setattr(importlib.import_module(f"lizard_ops.{module}"), name, size)


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is first imported
