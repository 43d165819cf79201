"""Which implementation, device and dtype the properties of the ops are tested in."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable

import pytest
import torch
from gpu_forms import FORMS, INTERPRETED_FORMS


@dataclasses.dataclass(frozen=True)
class Target:
    """One implementation under test; ``effort`` scales the number of examples.

    form: on a GPU and in the interpreter, the options of the op that are fixed (gpu_forms.FORMS). times: --effort.
    """

    impl: str
    device: str
    dtype: torch.dtype
    effort: float
    form: str | None = None
    times: float = 1.0

    def count(self, examples: int) -> int:
        return round(self.times * max(1 if self.interpreted else 3, round(self.effort * examples)))

    @property
    def interpreted(self) -> bool:
        return self.impl == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        form = "" if self.form is None else f"-{self.form}"
        return f"{self.impl}-{self.device}-{str(self.dtype).removeprefix('torch.')}{form}"


CPU = (Target("torch", "cpu", torch.float64, 0.6), Target("torch", "cpu", torch.float32, 0.3))
INTERPRETED = (Target("triton", "cpu", torch.float32, 0.0),)
INTERPRETED_HALF = (Target("triton", "cpu", torch.float16, 0.0),)
CUDA = tuple(Target("triton", "cuda", dtype, 0.05) for dtype in (torch.float32, torch.bfloat16, torch.float16))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fill in the argument that asks for implementations.

    target: the PyTorch paths on a CPU, the Triton kernels on a GPU. any_target: in Triton's interpreter too, which is
    slow, so only what needs it asks for it. every_target: there in half precision as well. torch_target: the PyTorch
    paths alone. With the argument ``op`` beside it the check runs for every op, ``linear_op`` for those with a linear
    branch, on a GPU for every form of it; the checks of a form share a worker (``--dist loadgroup``), so that each
    kernel is compiled once.
    """
    on_gpu = metafunc.config.getoption("--device") == "cuda"
    kinds = {
        "target": CUDA if on_gpu else CPU,
        "any_target": CUDA if on_gpu else CPU + INTERPRETED,
        "every_target": CUDA if on_gpu else CPU + INTERPRETED + INTERPRETED_HALF,
        "torch_target": () if on_gpu else CPU,
    }
    times = metafunc.config.getoption("--effort")
    kinds = {name: tuple(dataclasses.replace(x, times=times) for x in targets) for name, targets in kinds.items()}
    for name in kinds.keys() & set(metafunc.fixturenames):
        ops = {"op", "linear_op"} & set(metafunc.fixturenames)
        if not ops:
            metafunc.parametrize(name, kinds[name], ids=str)
            continue
        asked = ops.pop()
        shown = INTERPRETED_FORMS.get(metafunc.function.__name__, {})
        pairs = [
            (op, target)
            for op, forms in FORMS.items()
            if asked == "op" or op != "window"
            for target in in_forms(kinds[name], forms, shown.get(op, ()))
        ]
        groups = [[pytest.mark.xdist_group(f"{op}-{target}")] if on_gpu else [] for op, target in pairs]
        params = [
            pytest.param(op, target, id=f"{op}-{target}", marks=marks)
            for (op, target), marks in zip(pairs, groups, strict=True)
        ]
        metafunc.parametrize((asked, name), params)


def in_forms(targets: Iterable[Target], forms: Iterable[str], interpreted: Iterable[str]) -> list[Target]:
    """Each target in each of its forms: the PyTorch paths draw all options."""
    found = []
    for target in targets:
        fixed = forms if target.device == "cuda" else interpreted if target.interpreted else [None]
        found += [dataclasses.replace(target, form=form) for form in fixed]
    return found


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and tiles of a few positions, so that short sequences meet every boundary."""
    asked = [name for name in request.fixturenames if name.endswith("target")]
    if not asked:
        return
    target = request.getfixturevalue(asked[0])
    if target.interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        small_tiles(monkeypatch)
    for module, name, size in (
        ("gated_attn.chunk_torch", "HEAD_GATE_CHUNK", 8),
        ("gated_attn.chunk_torch", "CHANNEL_GATE_CHUNK", 4),
        ("gated_attn.chunk_torch_tiles", "SCAN", 2),
        ("window_attn.chunk_torch", "BLOCK", 4),
    ):
        monkeypatch.setattr(importlib.import_module(f"lizard_ops.{module}"), name, size)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows in the chunks and tiles of the kernels, the fewest that a product takes."""
    shape = importlib.import_module("lizard_ops.hybrid_attn.triton.config").FusedShape
    launch = importlib.import_module("lizard_ops.tiles.launch").Launch
    monkeypatch.setattr(shape, "chunk", 16)
    monkeypatch.setattr(shape, "config", lambda self, kernel: launch(*(512, 1) if kernel == "scan" else (16, 16), 4, 1))
    monkeypatch.setattr(importlib.import_module("lizard_ops.gated_attn.triton.chunk"), "CHUNK", 16)
