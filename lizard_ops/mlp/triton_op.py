"""SiLU times product in one kernel, and as torch.library sees it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import Looking, is_watched, recorded
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import differentiable_once
from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.plans import Arguments, launch_planned, plan_of

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


@triton.jit
def silu_product_backward_kernel(
    gate, up, dy, d_gate, d_up, gate_row, up_row, dy_row, F: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """BF columns of one row [F] of both gradients."""
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    row = tl.cast(tl.program_id(0) // BLOCKS, tl.int64)
    f = tl.program_id(0) % BLOCKS * BF + tl.arange(0, BF)
    here = f < F
    g = tl.load(gate + row * gate_row + f, mask=here, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + f, mask=here, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_row + f, mask=here, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    silu = (g * share).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(d_up + row * F + f, (d * silu).to(d_up.dtype.element_ty), mask=here)
    d = d * u * (share * (1.0 + g * (1.0 - share)))
    tl.store(d_gate + row * F + f, d.to(d_gate.dtype.element_ty), mask=here)


def as_rows(x: Tensor) -> Tensor:
    """x [..., F] as [rows, F] with a unit last stride, a view where there is one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("lizard_ops::silu_product", mutates_args=())
def product(gate: Tensor, up: Tensor) -> Tensor:
    """y [..., F] like gate."""
    return launch(gate, up)


def launch(gate: Tensor, up: Tensor, known: dict[Any, Any] | None = None) -> Tensor:
    """``product``. known: of calls like this one, which differ in strides at most."""
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate, up = as_rows(gate), as_rows(up)
        steps = (gate.stride(0), up.stride(0))

        def arguments() -> Arguments:
            rows, columns = gate.shape
            block = min(COLUMNS, power_of_2(columns))
            return rows * cdiv(columns, block), (gate, up, y, *steps, columns, block), {"num_warps": 4}

        with on_device(gate):
            launch_planned(plan_of(known, steps), "product", silu_product_kernel, (gate, up, y), arguments)
    return y


@product.register_fake
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("lizard_ops::silu_product_backward", mutates_args=())
def product_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, like them."""
    d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    d_up = torch.empty_like(d_gate)
    if d_gate.numel():
        gate, up, dy = as_rows(gate), as_rows(up), as_rows(dy)
        rows, columns = gate.shape
        block = min(COLUMNS, power_of_2(columns))
        with on_device(gate):
            launch_kernel(
                silu_product_backward_kernel, rows * cdiv(columns, block),
                gate, up, dy, d_gate, d_up, gate.stride(0), up.stride(0), dy.stride(0), F=columns, BF=block, num_warps=4
            )  # fmt: skip
    return d_gate, d_up


@product_backward.register_fake
def _(gate, up, dy):
    return tuple(torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))


class _Product(torch.autograd.Function):
    """``product`` without the dispatch of a registered operator, which takes longer than the kernel."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return launch(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        quiet = not torch.is_grad_enabled() and not is_watched()
        d_gate, d_up = (product_backward._init_fn if quiet else product_backward)(*ctx.saved_tensors, dy)
        of_gate, of_up = ctx.needs_input_grad
        return d_gate if of_gate else None, d_up if of_up else None


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


product.register_autograd(_Product.backward, setup_context=_save)
differentiable_once(product_backward, "silu_product")
record_product = recorded(_Product)


def silu_product_triton(gate: Tensor, up: Tensor, looking: Looking, known: dict[Any, Any] | None = None) -> Tensor:
    """The product. looking: at these tensors. known: of this kind of call."""
    if looking is Looking.NOBODY:
        return launch(gate, up, known)
    return (record_product if looking is Looking.AUTOGRAD else product)(gate, up)
