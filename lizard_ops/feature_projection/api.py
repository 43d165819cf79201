"""A matrix per head before a feature map: the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import autocast_inputs, without_autocast
from lizard_ops.common.dispatch import choose_impl, float64_of
from lizard_ops.common.kinds import Kinds

_accepted = Kinds()


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
    _check(x, weight, "x", "weight")
    if choose_impl(impl, x, float64_of(x)) == "triton":
        from lizard_ops.feature_projection.triton.op import project_heads_triton

        return project_heads_triton(x, weight, reuse_gradient)
    grouped: Any = x.to(weight.dtype).unflatten(2, (weight.shape[0], -1))  # [B, T, M, G, D]
    with without_autocast(x):
        return x, torch.einsum("btmgd,mdf->btmgf", grouped, weight).flatten(2, 3).to(x.dtype)


def project_both(
    q: Tensor,
    k: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    *,
    reuse_gradient: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``project_heads`` of queries and of keys, in one kernel forward where Triton runs both.

    Args:
        q: [B, T, Hq, D] and k: [B, T, H, D], otherwise as ``project_heads``'s x.
        query_weight: [Mq, D, F], key_weight: [Mk, D, F'], as its weight.
        reuse_gradient, impl: as there.

    Returns:
        (q, k, fq [B, T, Hq, F], fk [B, T, H, F']), each with the bits of its own call.

    Raises:
        ValueError: as ``project_heads``, and for batches or lengths of k that are not those of q.
    """
    q, k = autocast_inputs(q, k)
    given = (q, k, query_weight, key_weight)
    _accepted.check(given, (), lambda: check_both(*given))
    if choose_impl(impl, q, float64_of(q) or float64_of(k)) == "triton":
        from lizard_ops.feature_projection.triton.op import project_both_triton

        return project_both_triton(q, k, query_weight, key_weight, reuse_gradient)
    q, fq = project_heads(q, query_weight, reuse_gradient=reuse_gradient, impl=impl)
    k, fk = project_heads(k, key_weight, reuse_gradient=reuse_gradient, impl=impl)
    return q, k, fq, fk


def check_both(q: Tensor, k: Tensor, query_weight: Tensor, key_weight: Tensor) -> None:
    """Raises as ``project_both``."""
    _check(q, query_weight, "q", "query_weight")
    _check(k, key_weight, "k", "key_weight")
    checks.check_tensor("k", k, (*q.shape[:2], k.shape[2], q.shape[3]), q, checks.FLOATS)


def _check(x: Tensor, weight: Tensor, name: str, of_weight: str) -> None:
    """Raises as ``project_heads``."""
    checks.want(
        isinstance(x, Tensor) and x.ndim == 4 and x.dtype in checks.FLOATS, name, x, "a floating tensor [B, T, H, D]"
    )
    floats = (torch.float64,) if x.dtype == torch.float64 else (torch.float32,)
    fits = isinstance(weight, Tensor) and weight.ndim == 3 and weight.dtype in floats and weight.device == x.device
    fits = fits and weight.shape[1] == x.shape[3] and min(weight.shape) > 0
    kind = str(floats[0]).removeprefix("torch.")
    checks.want(fits, of_weight, weight, "a {} tensor [M, {}, F] on {}", kind, x.shape[3], x.device)
    maps = weight.shape[0]
    checks.want(x.shape[2] > 0 and x.shape[2] % maps == 0, name, x, "a number of heads that is a multiple of {}", maps)
