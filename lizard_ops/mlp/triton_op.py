"""SiLU times product in one kernel, and as torch.library sees it."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import Looking, is_watched, recorded
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import differentiable_once
from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned, plan_of
from lizard_ops.tiles.replay import replayed

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


class Halves(NamedTuple):
    """The tensors of a call, and in its backward."""

    gate: Tensor
    up: Tensor
    dy: Tensor | None = None


def launch(gate: Tensor, up: Tensor, known: dict[Any, Any] | None = None) -> Tensor:
    """``product``. known: of calls like this one, which differ in strides at most."""
    given = Halves(gate, up)
    if known is None or not gate.numel():
        return launched(given, None)
    plan: Any = plan_of(known, (gate.stride(), up.stride()))
    return replayed(plan, given, lambda given: launched(given, plan))


def launched(given: Halves, plan: Plan | None) -> Tensor:
    """``launch``. plan: of calls with these strides."""
    y = torch.empty_like(given.gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate, up = as_rows(given.gate), as_rows(given.up)

        def arguments() -> Arguments:
            rows, columns = gate.shape
            block = min(COLUMNS, power_of_2(columns))
            args = (gate, up, y, gate.stride(0), up.stride(0), columns, block)
            return rows * cdiv(columns, block), args, {"num_warps": 4}

        with on_device(gate):
            launch_planned(plan, "product", silu_product_kernel, (gate, up, y), arguments)
    return y


@product.register_fake
def _(gate, up):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@torch.library.custom_op("lizard_ops::silu_product_backward", mutates_args=())
def product_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, like them."""
    return gradients(gate, up, dy)


def gradients(gate: Tensor, up: Tensor, dy: Tensor, known: dict[Any, Any] | None = None) -> tuple[Tensor, Tensor]:
    """``product_backward``. known: as for ``launch``."""
    given = Halves(gate, up, dy)
    if known is None or not gate.numel():
        return launched_back(given, None)
    plan: Any = plan_of(known, (gate.stride(), up.stride(), dy.stride()))
    return replayed(plan, given, lambda given: launched_back(given, plan))


def launched_back(given: Halves, plan: Plan | None) -> tuple[Tensor, Tensor]:
    """``gradients``. plan: of calls with these strides."""
    d_gate = torch.empty_like(given.gate, memory_format=torch.contiguous_format)
    d_up = torch.empty_like(d_gate)
    if d_gate.numel():
        gate, up, dy = as_rows(given.gate), as_rows(given.up), as_rows(cast(Tensor, given.dy))
        tensors = (gate, up, dy, d_gate, d_up)

        def arguments() -> Arguments:
            rows, columns = gate.shape
            block = min(COLUMNS, power_of_2(columns))
            args = (*tensors, gate.stride(0), up.stride(0), dy.stride(0), columns, block)
            return rows * cdiv(columns, block), args, {"num_warps": 4}

        with on_device(gate):
            launch_planned(plan, "back", silu_product_backward_kernel, tensors, arguments)
    return d_gate, d_up


@product_backward.register_fake
def _(gate, up, dy):
    return tuple(torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))


class _Product(torch.autograd.Function):
    """``product`` without the dispatch of a registered operator, which takes longer than the kernel."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, known: dict[Any, Any] | None) -> Tensor:
        ctx.known = known
        ctx.save_for_backward(gate, up)
        return launch(gate, up, known)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return *_backward(ctx, dy), None


def _backward(ctx: Any, dy: Tensor) -> Any:
    """Gradients of the arguments of ``product``."""
    quiet = not torch.is_grad_enabled() and not is_watched()
    gate, up = ctx.saved_tensors
    d_gate, d_up = gradients(gate, up, dy, ctx.known) if quiet else product_backward(gate, up, dy)
    of_gate, of_up, *_ = ctx.needs_input_grad
    return d_gate if of_gate else None, d_up if of_up else None


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.known = None
    ctx.save_for_backward(*inputs)


product.register_autograd(_backward, setup_context=_save)
differentiable_once(product_backward, "silu_product")
record_product = recorded(_Product)


def silu_product_triton(gate: Tensor, up: Tensor, looking: Looking, known: dict[Any, Any] | None = None) -> Tensor:
    """The product. looking: at these tensors. known: of this kind of call."""
    if looking is Looking.NOBODY:
        return launch(gate, up, known)
    return record_product(gate, up, known) if looking is Looking.AUTOGRAD else product(gate, up)
