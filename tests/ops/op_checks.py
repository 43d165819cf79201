"""How the outputs of a fast path are judged."""

from __future__ import annotations

from collections.abc import Callable, Container

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from op_cases import Case, call
from torch import Tensor

Outputs = dict[str, Tensor]


def examples(count: int, *strategies: st.SearchStrategy) -> Callable[[Callable], None]:
    """Run the decorated check on this many drawn examples at once, always the same ones.

    A failing example is made smaller first, unless so few were asked for that each must be slow.
    """
    phases = (Phase.generate,) if count < 5 else (Phase.generate, Phase.shrink)

    def run(check: Callable) -> None:
        settings(max_examples=count, phases=phases)(given(*strategies)(check))()

    return run


def one_of(strategy: st.SearchStrategy[Case]) -> Case:
    """A single drawn case, always the same one."""
    found = []
    examples(1, strategy)(lambda case: found.append(case))
    return found[0]


def with_gradients(run: Callable[[Case], Outputs], case: Case) -> Outputs:
    """Outputs, and gradients of all inputs for fixed random cotangents of every differentiable output."""
    leaves = {name: x.clone().requires_grad_() for name, x in case.leaves().items()}
    tracked = case.map(lambda name, _: leaves[name], weights=True)
    outputs = run(tracked)
    terms = [
        (torch.where(x.isfinite(), x, 0).double() * _cotangent(name, x)).sum()
        for name, x in outputs.items()
        if x.requires_grad and x.numel()
    ]
    grads = torch.autograd.grad(sum(terms), list(leaves.values()), allow_unused=True) if terms else [None] * len(leaves)
    zeros = (torch.zeros_like(x) if d is None else d for x, d in zip(leaves.values(), grads, strict=True))
    return {name: x.detach() for name, x in outputs.items()} | {
        f"d {name}": d for name, d in zip(leaves, zeros, strict=True)
    }


def _cotangent(name: str, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)


def judge(
    found: Outputs,
    case: Case,
    dtype: torch.dtype,
    naive: Callable[[Case], Outputs] | None = None,
    largest_score: float = 1.0,
    without: Container[str] = (),
) -> None:
    """Largest and RMS error against float64 at most twice those of the reference in this dtype.

    case: as given to the fast path, in dtype. naive: what the reference is to compute, ``call(case, "naive")`` with
    gradients where they were found. Float64 results must agree to 1e-9. largest_score: where scores are extreme a
    weight exp(s - lse) is known to |s| roundings only, unless its reference happens to be exact. without: what the
    reference has and ``found`` need not; every other output, state field and gradient must be there.
    """
    naive = naive or (lambda c: call(c, "naive"))
    gradients = any(name.startswith("d ") for name in found)
    reference = (lambda c: with_gradients(naive, c)) if gradients else naive
    exact = reference(case.cast(torch.float64))
    plain = exact if dtype == torch.float64 else reference(case.cast(dtype))
    wanted = {name for name in exact if name not in without}
    assert set(found) == wanted, set(found) ^ wanted
    sizes = {name: x.abs().max().item() if x.numel() else 0.0 for name, x in case.leaves().items()}
    flow = exact["d v"].abs().max().item() * sizes["v"] if gradients and exact["d v"].numel() else 0.0
    for name, x in found.items():
        before = _before_cancelling(name.removeprefix("d "), case, sizes) * flow * largest_score
        error = excess(x, plain[name], exact[name], dtype, before)
        assert error <= 1, f"{name}: {error:.3g} times the error that is allowed, {dtype}, {case.options}"


def _before_cancelling(name: str, case: Case, sizes: dict[str, float]) -> float:
    """Size of the terms of an input's gradient over that of the values' gradient times the values.

    They cancel, to nothing where one key has all the mass, because a normalised output knows ratios of weights alone.
    """
    if name in ("q", "k") and case.op != "gated":  # scores q.k are logs of weights
        return sizes["k" if name == "q" else "q"]
    finished = case.op == "gated" or case.options.get("feature_map") == "identity"
    if name in ("q", "k", "fq", "fk") and finished:  # weights are products of features, so terms are one over a row
        rows = case.tokens[name].abs().amax(-1)
        return 1.0 / rows[rows > 0].min().item() if rows.any() else 1.0
    return 1.0 if name in sizes else 0.0


def excess(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, before: float) -> float:
    """Error over what is allowed: twice that of ``plain`` and a floor of a few roundings, largest and RMS.

    before: size of the terms of a gradient before they cancel.
    """
    device, found = found.device, found.cpu()
    assert found.shape == exact.shape, (found.shape, exact.shape)
    if not exact.is_floating_point() or exact.numel() == 0:
        return 0.0 if torch.equal(found, exact) else float("inf")
    found, plain = found.double(), plain.double()
    if not torch.equal(found.isfinite(), exact.isfinite()):
        return float("inf")
    same = found == exact  # infinities too
    error, allowed = (torch.where(same, 0.0, x - exact).abs() for x in (found, plain))
    rounding = 1e-9 if dtype == torch.float64 else torch.finfo(dtype).eps
    return max(
        (f(error) / (2 * f(allowed) + rounding * (size + before) + 1e-300)).item()
        for f, size in zip((torch.amax, rms), floors(exact, device), strict=True)
    )


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def floors(exact: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sizes whose roundings are allowed beside the reference's error: of the largest error, and of the RMS.

    The largest error may be four roundings of the largest entry, by which a reference can be better by luck. Over many
    entries of a size luck evens out, and a quarter of a rounding is left for the RMS: less than half precision rounded
    through the other half precision errs by. On a GPU, where sums have another order, the RMS has the first floor.
    """
    size = torch.where(exact.isfinite(), exact, 0.0).abs().double()
    largest = 4 * size.amax()
    if device.type == "cuda":
        return largest, largest
    size = size / (size.amax() + 1e-300)
    entries = size.square().sum().square() / (size.pow(4).sum() + 1e-300)  # as many of equal size weigh as much
    return largest, (0.25 + 4 / (entries / 2).clamp(min=1.0).sqrt()) * rms(size) * largest / 4
