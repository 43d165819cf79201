"""How a fast path is judged: its errors against float64 beside those of the reference in the same dtype."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from op_checks import floors, rms
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Tensors = dict[str, Tensor]


def cast(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """Fresh leaves in this dtype; gates and sinks are float32 at least."""

    def one(name: str, x: Tensor) -> Tensor:
        wide = name.split()[-1] in ("g", "sinks") and dtype != torch.float64
        return x.detach().to(torch.float32 if wide else dtype).requires_grad_()

    return {name: one(name, x) if x.is_floating_point() else x for name, x in inputs.items()}


def with_gradients(run: Callable[[Tensors], Tensors], inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """Outputs of ``run``, and the gradients of all inputs for fixed random cotangents of all outputs."""
    leaves = cast(inputs, dtype)
    outputs = run(leaves)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for name, x in sorted(outputs.items()):
        if not x.requires_grad:
            continue
        generator = torch.Generator().manual_seed(len(name) + x.numel())
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        finite = torch.isfinite(x)
        loss = loss + (torch.where(finite, x, 0).double() * weight).sum()
    loss.backward()
    found = {name: x.detach() for name, x in outputs.items()}
    return found | {f"d {name}": x.grad for name, x in leaves.items() if x.grad is not None}


def check_against_naive(
    fast: Callable[[Tensors], Tensors], naive: Callable[[Tensors], Tensors], inputs: Tensors, dtype: torch.dtype
) -> None:
    """Largest and RMS error of every output and gradient at most twice the naive's in the same dtype."""
    inputs = {name: x.to(DEVICE) for name, x in cast(inputs, dtype).items()}
    exact = with_gradients(naive, inputs, torch.float64)
    plain = with_gradients(naive, inputs, dtype)
    found = with_gradients(fast, inputs, dtype)
    assert found.keys() == exact.keys()
    for name, reference in exact.items():
        excess = worst_excess(found[name], plain[name], reference, dtype, cancels=name.startswith("d "))
        assert excess <= 1, f"{name}: {excess:.3g} times the error that is allowed"


def check_fields(found: Tensors, plain: Tensors, exact: Tensors, dtype: torch.dtype) -> None:
    """Positions and scores exactly, everything else of outputs and states within ``worst_excess``."""
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        if wanted.dtype == torch.int64 or "scores" in name:
            assert torch.equal(found[name].double(), wanted.double()), name
        else:
            error = worst_excess(found[name], plain[name], wanted, dtype)
            assert error <= 1, f"{name}: {error:.3g} times the error that is allowed"


def worst_excess(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, cancels: bool = False) -> float:
    """Largest and RMS error over what is allowed: twice the error of ``plain``, and a few roundings.

    cancels: whether it is a gradient, with roundings of terms before they cancel, which count for its RMS too.
    """
    if not exact.is_floating_point() or exact.numel() == 0:
        return 0.0 if torch.equal(found, exact) else float("inf")
    error, allowed = (torch.where(x == exact.to(x.dtype), 0.0, x.double() - exact).abs() for x in (found, plain))
    eps, (largest, over_all) = torch.finfo(dtype).eps, floors(exact, found.device)
    sizes = (largest, largest if cancels else over_all)
    return max(
        (f(error) / (2 * f(allowed) + eps * size).clamp(min=1e-300)).nan_to_num(float("inf")).item()
        for f, size in zip((torch.amax, rms), sizes, strict=True)
    )
