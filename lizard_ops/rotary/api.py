"""Rotary position embedding: the function that layers call."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.dispatch import choose_impl


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto") -> Tensor:
    """Turn the channel pairs (d, d + D/2) of every head by the angles of its position::

        y[d]       = x[d] cos[d] - x[d + D/2] sin[d]
        y[d + D/2] = x[d + D/2] cos[d + D/2] + x[d] sin[d + D/2]          for d < D/2

    Args:
        x: [B, T, H, D] queries or keys, D even. Any floating dtype.
        cos, sin: [B or 1, T or 1, D], any floating dtype.
        impl: "auto" (Triton on CUDA tensors, unless one is float64, cos or sin needs a gradient, or torch.compile
            traces, which fuses the formula; PyTorch elsewhere), "triton", "torch" or "naive" (which is "torch").

    Returns:
        y [B, T, H, D] in the dtype of x. Triton computes in float32 and rounds once.

    Raises:
        ValueError: an argument of the wrong shape or device, or an impl that cannot do what is asked.

    Source: RoFormer (arXiv 2104.09864), in the half-split layout.
    """
    if chosen_turn(x, cos, sin, impl, "x") == "triton":
        from lizard_ops.rotary.triton_op import apply_rotary_triton

        return apply_rotary_triton(x, cos, sin)
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [B, T, 1, D]
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def apply_rotary_by(x: Tensor, steps: Tensor, frequencies: Tensor, *, impl: str = "auto") -> Tensor:
    """Turn every key by its own number of positions: ``apply_rotary`` of x with the angles ``steps * frequencies``.

    Angles are computed in float64, as a long text's need it; their cosine and sine are rounded to float32.

    Args:
        x: [N, R, D] keys, D even. Any floating dtype.
        steps: [N, R] int64, how many positions each moves on.
        frequencies: [D / 2] float32 or float64, radians a position, of either half of D.
        impl: "auto" (Triton on CUDA tensors, unless x is float64 or needs a gradient; PyTorch elsewhere), "triton",
            "torch" or "naive" (which is "torch").

    Returns:
        y [N, R, D] in the dtype of x.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or an impl that cannot do what is asked.
    """
    fits = isinstance(x, Tensor) and x.ndim == 3 and x.dtype in checks.FLOATS and x.shape[2] % 2 == 0
    checks.want(fits, "x", x, "a floating tensor [N, R, D] with an even D")
    checks.check_tensor("steps", steps, x.shape[:2], x, (torch.int64,))
    checks.check_tensor("frequencies", frequencies, (x.shape[2] // 2,), x, checks.GATE_FLOATS)
    gradients = torch.is_grad_enabled() and x.requires_grad
    beyond = "float64 tensors" if x.dtype == torch.float64 else "gradients" if gradients else None
    if choose_impl(impl, x, beyond) == "triton":
        from lizard_ops.rotary.triton_op import turn_by_steps

        return turn_by_steps(x, steps, frequencies)
    angles = steps[..., None].double() * frequencies.double()
    angles = torch.cat([angles, angles], -1)
    return apply_rotary(x.unsqueeze(2), angles.cos().float(), angles.sin().float(), impl="torch").squeeze(2)


def rotary_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """``apply_rotary`` of queries and of keys, in one kernel for either direction where Triton runs both.

    Args:
        q: [B, T, Hq, D] and k: [B, T, Hk, D], otherwise as ``apply_rotary``'s x. cos, sin, impl: as there.

    Returns:
        (q, k) turned, each in its dtype and with the bits of its own call.

    Raises:
        ValueError: as ``apply_rotary``, and for batches or lengths of k that are not those of q.
    """
    chosen = [chosen_turn(x, cos, sin, impl, name) for x, name in ((q, "q"), (k, "k"))]
    checks.check_tensor("k", k, (*q.shape[:2], k.shape[2], q.shape[3]), q, checks.FLOATS)
    if chosen != ["triton", "triton"]:
        return apply_rotary(q, cos, sin, impl=impl), apply_rotary(k, cos, sin, impl=impl)
    from lizard_ops.rotary.triton_op import rotary_both_triton

    return rotary_both_triton(q, k, cos, sin)


def chosen_turn(x: Tensor, cos: Tensor, sin: Tensor, impl: str, name: str) -> str:
    """The implementation that runs; while torch.compile traces, "torch" for "auto". Raises as ``apply_rotary``."""
    fits = isinstance(x, Tensor) and x.ndim == 4 and x.dtype in checks.FLOATS and x.shape[3] % 2 == 0
    checks.want(fits, name, x, "a floating tensor [B, T, H, D] with an even D")
    batch, length, _, dim = x.shape
    for which, turns in (("cos", cos), ("sin", sin)):
        fits = isinstance(turns, Tensor) and turns.ndim == 3 and turns.device == x.device
        for have, whole in zip(turns.shape, (batch, length), strict=False) if fits else ():
            fits = fits and (have == 1 or have == whole)  # torch.compile does not find an unknown size with ``in``
        fits = fits and turns.shape[2] == dim
        if not fits:  # a message that torch.compile writes makes it take every size for a constant
            checks.refuse(which, turns, f"a tensor [{batch} or 1, {length} or 1, {dim}] on {x.device}")
    beyond = None
    if torch.float64 in (x.dtype, cos.dtype, sin.dtype):
        beyond = "float64 tensors"
    elif torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        beyond = "gradients of cos and sin"
    fuses = impl == "auto" and torch.compiler.is_compiling()
    chosen = choose_impl(impl, x, beyond)
    return "torch" if fuses else chosen
