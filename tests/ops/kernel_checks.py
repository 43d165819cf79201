"""How a fast path is judged: its errors against float64 beside those of the reference in the same dtype."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Tensors = dict[str, Tensor]


def cast(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """Fresh leaves: float32 inputs (gates, sinks, sums) stay float32 unless dtype is float64."""

    def one(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        to = torch.float32 if x.dtype == torch.float32 and dtype != torch.float64 else dtype
        return x.detach().to(to).requires_grad_()

    return {name: one(x) for name, x in inputs.items()}


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
        if not reference.is_floating_point():
            assert torch.equal(found[name], reference), name
            continue
        same = found[name] == reference.to(found[name].dtype)  # infinities too
        error, allowed = (torch.where(same, 0.0, x.double() - reference).abs() for x in (found[name], plain[name]))
        floor = 4 * torch.finfo(dtype).eps * reference[torch.isfinite(reference)].abs().amax() if error.numel() else 0
        for size in (torch.amax, lambda x: x.square().mean().sqrt()):
            if error.numel():
                ours, limit = size(error).item(), (2 * size(allowed) + floor).item()
                assert ours <= limit, f"{name}: error {ours:.3g}, naive allows {limit:.3g}"
