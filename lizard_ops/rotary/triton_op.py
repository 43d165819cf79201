"""Rotary positions in one kernel, for both directions, and as torch.library sees it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import is_watched, nobody_looks, recorded
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned

PAIRS = 2048  # of channels that a program turns, as many as registers hold


@triton.jit
def turn_rows(
    n, x, cos, sin, y, tokens, length, x_b, x_t, x_h, cos_b, cos_t, sin_b, sin_t,
    H: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """y [tokens, H, 2 HALF] of the BN tokens from n on; BACKWARD: with the transposed matrix, from dy to dx."""
    row = tl.arange(0, BN * BH)
    n = tl.cast(n, tl.int64) + row // BH
    h = row % BH
    d = tl.arange(0, BD)
    here = ((n < tokens) & (h < H))[:, None] & (d < HALF)[None, :]
    b, t = n // length, n % length
    p_x = x + (b * x_b + t * x_t + h * x_h)[:, None] + d[None, :]
    p_cos = cos + (b * cos_b + t * cos_t)[:, None] + d[None, :]
    p_sin = sin + (b * sin_b + t * sin_t)[:, None] + d[None, :]
    first = tl.load(p_x, mask=here, other=0.0).to(tl.float32)
    second = tl.load(p_x + HALF, mask=here, other=0.0).to(tl.float32)
    cos_first = tl.load(p_cos, mask=here, other=0.0).to(tl.float32)
    cos_second = tl.load(p_cos + HALF, mask=here, other=0.0).to(tl.float32)
    sin_first = tl.load(p_sin, mask=here, other=0.0).to(tl.float32)
    sin_second = tl.load(p_sin + HALF, mask=here, other=0.0).to(tl.float32)
    if BACKWARD:
        turned_first = first * cos_first + second * sin_second
        turned_second = second * cos_second - first * sin_first
    else:
        turned_first = first * cos_first - second * sin_first
        turned_second = second * cos_second + first * sin_second
    p_y = y + ((n * H + h) * (2 * HALF))[:, None] + d[None, :]
    tl.store(p_y, turned_first.to(y.dtype.element_ty), mask=here)
    tl.store(p_y + HALF, turned_second.to(y.dtype.element_ty), mask=here)


@triton.jit
def turn_kernel(
    x, cos, sin, y, tokens, length, x_b, x_t, x_h, cos_b, cos_t, sin_b, sin_t,
    H: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """``turn_rows`` of BN tokens."""
    n = tl.program_id(0) * BN
    turn_rows(
        n, x, cos, sin, y, tokens, length, x_b, x_t, x_h, cos_b, cos_t, sin_b, sin_t, H, HALF, BH, BD, BN, BACKWARD
    )


@triton.jit
def turn_both_kernel(
    q, k, cos, sin, y_q, y_k, tokens, length, q_b, q_t, q_h, k_b, k_t, k_h, cos_b, cos_t, sin_b, sin_t, first,
    HQ: tl.constexpr, HK: tl.constexpr, HALF: tl.constexpr, BHQ: tl.constexpr, BHK: tl.constexpr, BD: tl.constexpr,
    BNQ: tl.constexpr, BNK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """``turn_rows`` of queries by the first programs, and of keys by the others."""
    program = tl.program_id(0)
    if program < first:
        turn_rows(
            program * BNQ, q, cos, sin, y_q, tokens, length, q_b, q_t, q_h, cos_b, cos_t, sin_b, sin_t,
            HQ, HALF, BHQ, BD, BNQ, BACKWARD,
        )  # fmt: skip
    else:
        turn_rows(
            (program - first) * BNK, k, cos, sin, y_k, tokens, length, k_b, k_t, k_h, cos_b, cos_t, sin_b, sin_t,
            HK, HALF, BHK, BD, BNK, BACKWARD,
        )  # fmt: skip


def steps_of(cos: Tensor, sin: Tensor) -> list[int]:
    """Strides of rows and positions, 0 where one serves all."""
    return [
        0 if size == 1 else stride for t in (cos, sin) for size, stride in zip(t.shape[:2], t.stride()[:2], strict=True)
    ]


def unit_rows(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def launch(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """Turned heads [B, T, H, D] of x, or the gradient of x from that of its turned heads."""
    x, cos, sin = unit_rows(x, cos, sin)
    batch, length, heads, dim = x.shape
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    tokens, wide, deep = batch * length, power_of_2(heads), power_of_2(dim // 2)
    rows = max(1, PAIRS // (wide * deep))
    with on_device(x):
        launch_kernel(
            turn_kernel, cdiv(tokens, rows),
            x, cos, sin, y, tokens, length, *x.stride()[:3], *steps_of(cos, sin),
            H=heads, HALF=dim // 2, BH=wide, BD=deep, BN=rows,
            BACKWARD=backward, num_warps=4,
        )  # fmt: skip
    return y


def launch_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """``launch`` of queries [B, T, Hq, D] and keys [B, T, Hk, D], T and B > 0, at once. plan: of a known
    kind of call."""
    q, k, cos, sin = unit_rows(q, k, cos, sin)
    tensors = (q, k, cos, sin, q.new_empty(q.shape), k.new_empty(k.shape))

    def arguments() -> Arguments:
        batch, length, heads, dim = q.shape
        tokens, deep = batch * length, power_of_2(dim // 2)
        wide = [power_of_2(heads), power_of_2(k.shape[2])]
        rows = [max(1, PAIRS // (w * deep)) for w in wide]
        programs = [cdiv(tokens, r) for r in rows]
        args = (
            *tensors, tokens, length, *q.stride()[:3], *k.stride()[:3], *steps_of(cos, sin), programs[0], heads,
            k.shape[2], dim // 2, *wide, deep, *rows, backward,
        )  # fmt: skip
        return sum(programs), args, {"num_warps": 4}

    with on_device(q):
        launch_planned(plan, "turned", turn_both_kernel, tensors, arguments)
    return tensors[4], tensors[5]


@torch.library.custom_op("lizard_ops::apply_rotary", mutates_args=())
def turn(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    """``launch``. The gradient of one direction is the other."""
    return launch(x, cos, sin, backward)


@turn.register_fake
def _(x, cos, sin, backward):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, cos, sin, ctx.backward = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy):
    return turn(dy, *ctx.saved_tensors, not ctx.backward), None, None, None


turn.register_autograd(_backward, setup_context=_setup_context)


class _Turn(torch.autograd.Function):
    """``turn`` without the dispatch of a registered op, which takes longer than the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return launch(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # with create_graph=True
        return (turn if again else launch)(dy, *ctx.saved_tensors, True), None, None


def apply_rotary_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turned heads [B, T, H, D]; torch.compile sees the registered op."""
    if torch.compiler.is_compiling():
        return turn(x, cos, sin, False)
    if nobody_looks(x, cos, sin):
        return launch(x, cos, sin, False)
    return _Turn.apply(x, cos, sin)


@triton.jit
def steps_kernel(
    x, steps, frequencies, y, rows, length, x_n, x_r, HALF: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """y [rows, 2 HALF] of BR rows, each turned by its own steps; angles in float64."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    here = (row < rows)[:, None] & (d < HALF)[None, :]
    p_x = x + (row // length * x_n + row % length * x_r)[:, None] + d[None, :]
    b_steps = tl.load(steps + row, mask=row < rows, other=0).to(tl.float64)
    b_frequency = tl.load(frequencies + d, mask=d < HALF, other=0.0).to(tl.float64)
    angle = b_steps[:, None] * b_frequency[None, :]
    cos, sin = tl.cos(angle).to(tl.float32), tl.sin(angle).to(tl.float32)
    first = tl.load(p_x, mask=here, other=0.0).to(tl.float32)
    second = tl.load(p_x + HALF, mask=here, other=0.0).to(tl.float32)
    p_y = y + (row * (2 * HALF))[:, None] + d[None, :]
    tl.store(p_y, (first * cos - second * sin).to(y.dtype.element_ty), mask=here)
    tl.store(p_y + HALF, (second * cos + first * sin).to(y.dtype.element_ty), mask=here)


@torch.library.custom_op("lizard_ops::apply_rotary_by", mutates_args=())
def turn_by_steps(x: Tensor, steps: Tensor, frequencies: Tensor) -> Tensor:
    """Keys [N, R, D], each turned by its own steps [N, R]; no gradient."""
    x, steps, frequencies = x if x.stride(-1) == 1 else x.contiguous(), steps.contiguous(), frequencies.contiguous()
    number, length, dim = x.shape
    y = x.new_empty(x.shape)
    if not y.numel():
        return y
    deep = triton.next_power_of_2(dim // 2)
    block = max(1, PAIRS // 4 // deep)  # cosines of float64 take many registers
    with on_device(x):
        launch_kernel(
            steps_kernel, triton.cdiv(number * length, block),
            x, steps, frequencies, y, number * length, length, *x.stride()[:2],
            HALF=dim // 2, BD=deep, BR=block, num_warps=4,
        )  # fmt: skip
    return y


@turn_by_steps.register_fake
def _(x, steps, frequencies):
    return x.new_empty(x.shape)


class _TurnBoth(torch.autograd.Function):
    """``_Turn`` of queries and keys, in one launch a direction."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        return launch_both(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor | None, d_k: Tensor | None) -> tuple[Tensor | None, ...]:
        turns = ctx.saved_tensors
        if d_q is None or d_k is None or torch.is_grad_enabled():  # with create_graph=True
            again = turn if torch.is_grad_enabled() else launch
            return (*(None if d is None else again(d, *turns, True) for d in (d_q, d_k)), None, None)
        return (*launch_both(d_q, d_k, *turns, True), None, None)


record_both = recorded(_TurnBoth)


def rotary_both_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turned heads of queries and keys; two operators for those who look at operators."""
    if is_watched() or not q.numel() or not k.numel():
        return apply_rotary_triton(q, cos, sin), apply_rotary_triton(k, cos, sin)
    if nobody_looks(q, k, cos, sin):
        return launch_both(q, k, cos, sin, False)
    return record_both(q, k, cos, sin)
