"""Root-mean-square norm: the function that models call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.direct import Looking, nobody_looks, who_looks
from lizard_ops.common.dispatch import choose_impl
from lizard_ops.common.kinds import Kinds
from lizard_ops.norm.row import rms_norm_row

_accepted = Kinds()


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, impl: str = "auto") -> Tensor:
    """The root-mean-square norm of the last axis, in float32, as the families of Llama and of Gemma round it::

        n = x / sqrt(mean_d x[d]^2 + eps)
        y = weight n                      n rounded to the dtype of x first
        y = (1 + weight) n                with unit_offset, rounded once

    Args:
        x: [..., D], float32 or half precision.
        weight: [D] in any of these dtypes; without unit_offset that of x.
        eps: added to the mean square, a positive number.
        unit_offset: the weight is what is beyond 1.
        impl: "auto" (Triton on CUDA tensors where torch.compile does not trace, which fuses the formula; PyTorch
            elsewhere), "triton", "torch" or "naive" (which is "torch").

    Returns:
        y like x. Sums are in another order in Triton, so that a few values round otherwise; gradients are float32 sums
        in one order, rounded once, that of the weight only where it is asked for. Triton has first derivatives alone.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or an impl that cannot do what is asked.

    Source: RMSNorm (arXiv 1910.07467).
    """
    looking = who_looks(x, weight)
    traced = looking is Looking.MORE and torch.compiler.is_compiling()
    known = _accepted.check((x, weight), (eps, unit_offset), lambda: _check(x, weight, eps, unit_offset), traced)
    if choose_impl("torch" if traced and impl == "auto" else impl, x, None) == "triton":
        from lizard_ops.norm.triton_op import rms_norm_triton

        return rms_norm_triton(x, weight, eps, unit_offset, looking, known)
    return _by_torch(x, weight, eps, unit_offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The sum that a layer passes on and its norm, which the next part reads, in one kernel::

        s = residual + x                                 rounded to the dtype of x
        y = rms_norm(s, weight, eps, unit_offset)

    Args:
        x: [..., D], what a part of a layer has computed, float32 or half precision.
        residual: what it read, like x in shape and dtype.
        weight, eps, unit_offset, impl: as for ``rms_norm``.

    Returns:
        (s, y), both like x, with the bits of a sum and a ``rms_norm`` of the same impl.

    Raises:
        ValueError: as ``rms_norm``, and for a residual that is not like x.

    Source: RMSNorm (arXiv 1910.07467) behind the residual sums of pre-norm transformers.
    """

    def check() -> None:
        _check(x, weight, eps, unit_offset)
        checks.check_tensor("residual", residual, x.shape, x, (x.dtype,))

    looking = who_looks(x, residual, weight)
    traced = looking is Looking.MORE and torch.compiler.is_compiling()
    known = _accepted.check((x, weight, residual), (eps, unit_offset), check, traced)
    if choose_impl("torch" if traced and impl == "auto" else impl, x, None) == "triton":
        from lizard_ops.norm.triton_op import add_rms_norm_triton

        return add_rms_norm_triton(x, residual, weight, eps, unit_offset, looking, known)
    s = residual + x
    return s, _by_torch(s, weight, eps, unit_offset)


def _by_torch(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """``rms_norm`` in PyTorch; of a row on a CPU in fewer operators, where nobody looks at them."""
    if x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32:
        if nobody_looks(x, weight):
            normed = rms_norm_row(x.view(-1), weight, eps, unit_offset)
            return normed.view(x.shape)
    exact = x.float()
    normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).type_as(x) if unit_offset else weight * normed.to(x.dtype)


def _check(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> None:
    """Raises as ``rms_norm``."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    fits = isinstance(x, Tensor) and x.ndim > 0 and x.dtype in floats and x.shape[-1] > 0
    checks.want(fits, "x", x, "a tensor [..., D] of float32 or half precision, D >= 1")
    checks.check_tensor("weight", weight, x.shape[-1:], x, floats if unit_offset else (x.dtype,))
    real = isinstance(eps, float) and math.isfinite(eps) and eps > 0
    checks.want(real, "eps", eps, "a positive finite float")
    checks.check_flag("unit_offset", unit_offset)
