"""SiLU times product in one kernel, and as torch.library sees it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import direct
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.sizes import cdiv, power_of_2

COLUMNS = 1024  # of a program


@triton.jit
def silu_product_kernel(gate, up, y, gate_row, up_row, F: tl.constexpr, BF: tl.constexpr):
    """BF columns of one row [F] of y."""
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    row = tl.cast(tl.program_id(0) // BLOCKS, tl.int64)
    f = tl.program_id(0) % BLOCKS * BF + tl.arange(0, BF)
    g = tl.load(gate + row * gate_row + f, mask=f < F, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + f, mask=f < F, other=0.0).to(tl.float32)
    silu = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * F + f, (silu * u).to(y.dtype.element_ty), mask=f < F)


def as_rows(x: Tensor) -> Tensor:
    """x [..., F] as [rows, F] with a unit last stride, a view where there is one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("lizard_ops::silu_product", mutates_args=())
def product(gate: Tensor, up: Tensor) -> Tensor:
    """y [..., F] like gate."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate, up = as_rows(gate), as_rows(up)
        rows, columns = gate.shape
        block = min(COLUMNS, power_of_2(columns))
        with on_device(gate):
            silu_product_kernel[(rows * cdiv(columns, block),)](
                gate, up, y, gate.stride(0), up.stride(0), F=columns, BF=block, num_warps=4
            )
    return y


@product.register_fake
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def silu_product_triton(gate: Tensor, up: Tensor) -> Tensor:
    """The product, where no gradient is recorded."""
    return direct(product, gate, up)(gate, up)
