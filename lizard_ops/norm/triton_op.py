"""Root-mean-square norm in one kernel, and as torch.library sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import Looking, is_watched, recorded
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import differentiable_once
from lizard_ops.common.sizes import power_of_2
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned, plan_of
from lizard_ops.tiles.replay import replayed

PROGRAMS = 512  # that share the rows of a weight's gradient


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


@triton.jit
def rms_norm_backward_kernel(
    x, weight, dy, ds, dx, parts, eps, rows, heads, x_t, x_h, D: tl.constexpr, BD: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Of each P-th row of P programs: dx [rows, D] with ds added, and in parts [P, D] the sum of the weight's gradient.

    ds, dx and parts may be None. Rows of x as in ``rms_norm_kernel``.
    """
    program = tl.program_id(0)
    d = tl.arange(0, BD)
    here = d < D
    w = tl.load(weight + d, mask=here, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        w += 1.0
    total = tl.zeros([BD], tl.float32)
    for i in range(program, rows, tl.num_programs(0)):
        number = tl.cast(i, tl.int64)
        n = tl.load(x + number // heads * x_t + number % heads * x_h + d, mask=here, other=0.0).to(tl.float32)
        g = tl.load(dy + number * D + d, mask=here, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(n * n, 0) / D + eps)
        n = n * scale
        if parts is not None:
            if UNIT_OFFSET:
                total += g * n
            else:
                total += g * n.to(x.dtype.element_ty).to(tl.float32)
        if dx is not None:
            g = g * w
            g = (g - n * (tl.sum(g * n, 0) / D)) * scale
            if ds is not None:
                g += tl.load(ds + number * D + d, mask=here, other=0.0).to(tl.float32)
            tl.store(dx + number * D + d, g.to(dx.dtype.element_ty), mask=here)
    if parts is not None:
        tl.store(parts + tl.cast(program, tl.int64) * D + d, total, mask=here)


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x, heads, steps from token to token and from head to head) of x [..., D] with a row or more.

    Heads of one product with others are apart from token to token; another layout is copied.
    """
    if x.is_contiguous():
        return x, 1, x.shape[-1], 0
    if x.ndim == 4 and x.stride(3) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        return x, x.shape[2], x.stride(1), x.stride(2)
    return x.contiguous(), 1, x.shape[-1], 0


class Rows(NamedTuple):
    """The tensors of a call."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor


class Back(NamedTuple):
    """Those of its backward."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    ds: Tensor | None  # what comes back for x itself


def strides(tensors: Sequence[Tensor | None]) -> list[tuple[int, ...] | None]:
    return [None if x is None else x.stride() for x in tensors]


def launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, unit_offset: bool,
    known: dict[Any, Any] | None = None,
) -> Any:  # fmt: skip
    """y, with a residual (s, y). known: of calls like this one, which differ in strides at most."""
    given = Rows(x, residual, weight)
    if known is None or not x.numel():
        return launched(given, eps, unit_offset, None)
    plan: Any = plan_of(known, (*strides(given),))
    return replayed(plan, given, lambda given: launched(given, eps, unit_offset, plan))


def launched(given: Rows, eps: float, unit_offset: bool, plan: Plan | None) -> Any:
    """``launch``. plan: of calls with these strides."""
    x, residual, weight = given.x, given.residual, given.weight.contiguous()
    if residual is not None:
        x, residual = x.contiguous(), residual.contiguous()
    s = None if residual is None else torch.empty_like(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        x, heads, *steps = rows_of(x)
        tensors = (x, residual, weight, s, y)

        def arguments() -> Arguments:
            dim = x.shape[-1]
            block = power_of_2(dim)
            args = (*tensors, eps, heads, *steps, dim, block, unit_offset)
            return x.numel() // dim, args, {"num_warps": max(1, min(16, block // 256))}

        with on_device(x):
            launch_planned(plan, "norm", rms_norm_kernel, tensors, arguments)
    return y if s is None else (s, y)


def gradients(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, dy: Tensor, ds: Tensor | None, of_x: bool,
    of_weight: bool, known: dict[Any, Any] | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dweight), None where not asked for, of the norm y of x. ds: what comes back for x itself, to be added to dx.
    known: as for ``launch``.

    Sums are float32, in one order.
    """
    given = Back(x, weight, dy, ds)
    if known is None or not x.numel() or not (of_x or of_weight):
        return launched_back(given, eps, unit_offset, of_x, of_weight, None)
    plan: Any = plan_of(known, (*strides(given), of_x, of_weight))
    return replayed(plan, given, lambda given: launched_back(given, eps, unit_offset, of_x, of_weight, plan))


def launched_back(
    given: Back, eps: float, unit_offset: bool, of_x: bool, of_weight: bool, plan: Plan | None
) -> tuple[Tensor | None, Tensor | None]:
    """``gradients``. plan: of calls with these strides."""
    x, dim = given.x, given.x.shape[-1]
    rows, block = x.numel() // dim, power_of_2(dim)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if of_x else None
    programs = min(rows, PROGRAMS) if of_weight else rows
    parts = x.new_empty(programs, dim, dtype=torch.float32) if of_weight else None
    if rows:
        x, heads, *steps = rows_of(x)
        ds = None if given.ds is None else given.ds.contiguous()
        tensors = (x, given.weight.contiguous(), given.dy.contiguous(), ds, dx, parts)

        def arguments() -> Arguments:
            args = (*tensors, eps, rows, heads, *steps, dim, block, unit_offset)
            return programs, args, {"num_warps": max(1, min(16, block // 256))}

        with on_device(x):
            launch_planned(plan, "back", rms_norm_backward_kernel, tensors, arguments)
    return dx, None if parts is None else parts.sum(0).to(given.weight.dtype)


@torch.library.custom_op("lizard_ops::rms_norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """y [..., D] like x."""
    return launch(x, None, weight, eps, unit_offset)


@norm.register_fake
def _(x, weight, eps, unit_offset):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("lizard_ops::add_rms_norm", mutates_args=())
def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    """(s, y), both [..., D] like x."""
    return launch(x, residual, weight, eps, unit_offset)


@add_norm.register_fake
def _(x, residual, weight, eps, unit_offset):
    like = torch.empty_like(x, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


@torch.library.custom_op("lizard_ops::rms_norm_backward", mutates_args=())
def norm_backward(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, dy: Tensor, ds: Tensor | None, of_x: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """``gradients``, empty where not asked for."""
    dx, d_weight = gradients(x, weight, eps, unit_offset, dy, ds, of_x, of_weight)
    return x.new_empty(0) if dx is None else dx, weight.new_empty(0) if d_weight is None else d_weight


@norm_backward.register_fake
def _(x, weight, eps, unit_offset, dy, ds, of_x, of_weight):
    return x.new_empty(x.shape if of_x else (0,)), weight.new_empty(weight.shape if of_weight else (0,))


def _backward(ctx: Any, x: Tensor, weight: Tensor, dy: Tensor, ds: Tensor | None, of_x: bool, of_weight: bool) -> Any:
    given = (x, weight, ctx.eps, ctx.unit_offset, dy, ds, of_x, of_weight)
    if not torch.is_grad_enabled() and not is_watched():
        return gradients(*given, ctx.known)
    dx, d_weight = norm_backward(*given)
    return dx if of_x else None, d_weight if of_weight else None


class _Norm(torch.autograd.Function):
    """``norm`` without the dispatch of a registered operator, which takes longer than the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        ctx.eps, ctx.unit_offset, ctx.known = rest
        ctx.save_for_backward(x, weight)
        return launch(x, None, weight, *rest)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return *_of_norm(ctx, dy), None


def _of_norm(ctx: Any, dy: Tensor) -> Any:
    """Gradients of the arguments of ``norm``."""
    of_x, of_weight, *_ = ctx.needs_input_grad
    return *_backward(ctx, *ctx.saved_tensors, dy, None, of_x, of_weight), None, None


def _save_norm(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, ctx.unit_offset = inputs
    ctx.known = None
    ctx.save_for_backward(*tensors)


norm.register_autograd(_of_norm, setup_context=_save_norm)


class _AddNorm(torch.autograd.Function):
    """As ``_Norm``, of ``add_norm``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, *rest: Any) -> Any:
        ctx.eps, ctx.unit_offset, ctx.known = rest
        ctx.set_materialize_grads(False)
        s, y = launch(x, residual, weight, *rest)
        ctx.save_for_backward(s, weight)
        return s, y

    @staticmethod
    def backward(ctx: Any, ds: Tensor | None, dy: Tensor | None) -> Any:
        return *_of_sum(ctx, ds, dy), None


def _of_sum(ctx: Any, ds: Tensor | None, dy: Tensor | None) -> Any:
    """Gradients of the arguments of ``add_norm``."""
    s, weight = ctx.saved_tensors
    of_x, of_residual, of_weight, *_ = ctx.needs_input_grad
    of_sum, d_weight = of_x or of_residual, None
    if dy is not None:
        ds, d_weight = _backward(ctx, s, weight, dy, ds, of_sum, of_weight)
    return ds if of_x else None, ds if of_residual else None, d_weight, None, None


def _save_sum(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    _, _, weight, ctx.eps, ctx.unit_offset = inputs
    ctx.known = None
    ctx.save_for_backward(output[0], weight)


add_norm.register_autograd(_of_sum, setup_context=_save_sum)
differentiable_once(norm_backward, "rms_norm")
record_norm, record_sum = recorded(_Norm), recorded(_AddNorm)


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, unit_offset: bool, looking: Looking, known: dict[Any, Any] | None = None
) -> Tensor:
    """The norm. looking: at these tensors. known: of this kind of call."""
    if looking is Looking.NOBODY:
        return launch(x, None, weight, eps, unit_offset, known)
    if looking is Looking.AUTOGRAD:
        return record_norm(x, weight, eps, unit_offset, known)
    return norm(x, weight, eps, unit_offset)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit_offset: bool, looking: Looking,
    known: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum and its norm. looking: at these tensors. known: of this kind of call."""
    if looking is Looking.NOBODY:
        return launch(x, residual, weight, eps, unit_offset, known)
    if looking is Looking.AUTOGRAD:
        return record_sum(x, residual, weight, eps, unit_offset, known)
    return add_norm(x, residual, weight, eps, unit_offset)
