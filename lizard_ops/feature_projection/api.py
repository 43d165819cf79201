"""A matrix per head before a feature map: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import autocast_inputs, without_autocast
from lizard_ops.common.dispatch import choose_impl, float64_of


def project_heads(
    x: Tensor, weight: Tensor, *, reuse_gradient: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The pre-activations of a feature map, and x once more, for whatever else reads it::

        y[b, t, h, f] = sum_d x[b, t, h, d] weight[h // (H // M), d, f]

    Queries and keys go to a feature map and to the window too, so x has two gradients. A caller that goes on with the
    returned x lets one kernel form dy W^T and add the other gradient, instead of a product and a sum in memory.

    Args:
        x: [B, T, H, D] queries or keys. bfloat16, float16, float32 or float64.
        weight: [M, D, F] float32 or float64, M a divisor of H: one matrix for all heads, or one for each of M groups.
        reuse_gradient: the gradient of the returned x may be overwritten with that of x, which saves a tensor of its
            size in the backward pass. Only where nobody else has that gradient: the returned x is read by
            ``chunk_hybrid_attn``, ``window_attn``, ``apply_rotary`` or ``rotary_both``, and neither hooks nor
            ``torch.autograd.grad`` ask for it. A sum hands its gradient to both of its terms, so it is no such reader.
        impl: "auto" (Triton on CUDA tensors other than float64, PyTorch elsewhere), "triton", "torch" or "naive" (which
            is the "torch" einsum).

    Products with a half-precision x take the weight in two parts, so that they have float32's digits; sums are float32.
    Under autocast x takes its dtype.

    Returns:
        (x, y), y [B, T, H, F] in the dtype of x. Both are differentiable, in x and weight.

    Raises:
        ValueError: an argument of the wrong type, rank, shape, dtype or device, or heads that M does not divide.

    Source: the Hedgehog feature map (arXiv 2402.04347), one matrix per head as in LoLCATs (arXiv 2410.10254).
    """
    (x,) = autocast_inputs(x)
    checks.want(
        isinstance(x, Tensor) and x.ndim == 4 and x.dtype in checks.FLOATS, "x", x, "a floating tensor [B, T, H, D]"
    )
    floats = (torch.float64,) if x.dtype == torch.float64 else (torch.float32,)
    fits = isinstance(weight, Tensor) and weight.ndim == 3 and weight.dtype in floats and weight.device == x.device
    fits = fits and weight.shape[1] == x.shape[3] and min(weight.shape) > 0
    kind = str(floats[0]).removeprefix("torch.")
    checks.want(fits, "weight", weight, "a {} tensor [M, {}, F] on {}", kind, x.shape[3], x.device)
    maps = weight.shape[0]
    checks.want(x.shape[2] > 0 and x.shape[2] % maps == 0, "x", x, "a number of heads that is a multiple of {}", maps)
    if choose_impl(impl, x, float64_of(x)) == "triton":
        from lizard_ops.feature_projection.triton.op import project_heads_triton

        return project_heads_triton(x, weight, reuse_gradient)
    grouped: Any = x.to(weight.dtype).unflatten(2, (maps, -1))  # [B, T, M, G, D]
    with without_autocast(x):
        return x, torch.einsum("btmgd,mdf->btmgf", grouped, weight).flatten(2, 3).to(x.dtype)
