"""Root-mean-square norm in one kernel, and as torch.library sees it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import direct
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.sizes import power_of_2


@triton.jit
def rms_norm_kernel(
    x, residual, weight, s, y, eps, heads, x_t, x_h, D: tl.constexpr, BD: tl.constexpr, UNIT_OFFSET: tl.constexpr
):  # fmt: skip
    """One row [D] of y; with a residual its sum with x is written to s, and y is the norm of that.

    Row r of x is that of head r % heads.
    """
    number = tl.cast(tl.program_id(0), tl.int64)
    row = number * D
    d = tl.arange(0, BD)
    here = d < D
    n = tl.load(x + number // heads * x_t + number % heads * x_h + d, mask=here, other=0.0).to(tl.float32)
    if residual is not None:
        n = tl.load(residual + row + d, mask=here, other=0.0).to(tl.float32) + n
        n = n.to(y.dtype.element_ty)
        tl.store(s + row + d, n, mask=here)
        n = n.to(tl.float32)
    w = tl.load(weight + d, mask=here, other=0.0).to(tl.float32)
    n = n / tl.sqrt(tl.sum(n * n, 0) / D + eps)
    if UNIT_OFFSET:
        n = n * (1.0 + w)
    else:
        n = n.to(y.dtype.element_ty).to(tl.float32) * w
    tl.store(y + row + d, n.to(y.dtype.element_ty), mask=here)


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, heads, steps from token to token and from head to head) of x [..., D] with a row or more.

    Heads of one product with others are apart from token to token; another layout is copied.
    """
    if x.is_contiguous():
        return x, 1, x.shape[-1], 0
    if x.ndim == 4 and x.stride(3) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x, x.shape[2], x.stride(1), x.stride(2)
    return x.contiguous(), 1, x.shape[-1], 0


def launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, s: Tensor | None, eps: float, unit_offset: bool
) -> Tensor:
    """y; fills s where there is a residual."""
    weight, dim = weight.contiguous(), x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, block = x.numel() // dim, power_of_2(dim)
    if rows:
        x, heads, *steps = rows_of(x)
        with on_device(x):
            rms_norm_kernel[(rows,)](
                x, residual, weight, s, y, eps, heads, *steps, D=dim, BD=block, UNIT_OFFSET=unit_offset,
                num_warps=max(1, min(16, block // 256)),
            )  # fmt: skip
    return y


@torch.library.custom_op("lizard_ops::rms_norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """y [..., D] like x."""
    return launch(x, None, weight, None, eps, unit_offset)


@norm.register_fake
def _(x, weight, eps, unit_offset):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("lizard_ops::add_rms_norm", mutates_args=())
def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """(s, y), both [..., D] like x."""
    x, residual = x.contiguous(), residual.contiguous()
    s = torch.empty_like(x)
    return s, launch(x, residual, weight, s, eps, unit_offset)


@add_norm.register_fake
def _(x, residual, weight, eps, unit_offset):
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """The norm, where no gradient is recorded."""
    return direct(norm, x, weight)(x, weight, eps, unit_offset)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool
) -> tuple[Tensor, Tensor]:
    """The sum and its norm, where no gradient is recorded."""
    return direct(add_norm, x, residual, weight)(x, residual, weight, eps, unit_offset)
