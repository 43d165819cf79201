"""Gate and merge bias of many bfloat16 tokens: products of matrices with the float32 weights as sums of three parts.

A float32 number is the sum of three of bfloat16, so products of these on tensor cores, summed in float32, are those of
float32, which a GPU forms on slower units and from a float32 copy of the tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import is_watched, recorded
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.gate.formula import gate_and_bias_formula
from lizard_ops.gate.triton_op import log_sigmoid
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned
from lizard_ops.tiles.replay import replayed

COLUMNS = 1024  # of a weight's row that a program splits
NUMBERS = 4096  # of outputs that a program has in registers


@triton.jit
def three_parts(w):
    """bfloat16 (high, middle, low) whose sum is w."""
    high = w.to(tl.bfloat16)
    rest = w - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def split_weights_kernel(gate_weight, bias_weight, parts, D, G: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """parts [4, C, D], high, high, middle and low, of the C rows of both weights."""
    blocks = tl.cdiv(D, BD)
    row = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    weight = gate_weight + row * D
    if row >= G:
        weight = bias_weight + (row - G) * D
    high, middle, low = three_parts(tl.load(weight + d, mask=d < D, other=0.0))
    out, step = parts + row * D + d, C * D
    tl.store(out, high, mask=d < D)
    tl.store(out + step, high, mask=d < D)
    tl.store(out + 2 * step, middle, mask=d < D)
    tl.store(out + 3 * step, low, mask=d < D)


@triton.jit(do_not_specialize=["temperature"])
def outputs_kernel(
    y, gate_bias, bias, g, m, z, tokens, temperature, G: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """g and m of the sums y [tokens, 3, C] of high, middle and low; z, the logits of the gates."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    c = tl.arange(0, BC)[None, :]
    here = (n < tokens) & (c < C)
    of_y = y + n * (3 * C) + c
    total = tl.load(of_y + 2 * C, mask=here, other=0.0) + tl.load(of_y + C, mask=here, other=0.0)
    total += tl.load(of_y, mask=here, other=0.0)
    total += tl.load(gate_bias + c, mask=c < G, other=0.0)
    if bias is not None:
        total += tl.load(bias + c - G, mask=(c >= G) & (c < C), other=0.0)
    of_gate = here & (c < G)
    tl.store(z + n * G + c, total, mask=of_gate)
    tl.store(g + n * G + c, log_sigmoid(total) / temperature, mask=of_gate)
    tl.store(m + n * (C - G) + c - G, total, mask=here & (c >= G))


@triton.jit(do_not_specialize=["temperature"])
def gradient_parts_kernel(
    z, dg, dm, d_total, parts, tokens, temperature, G: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """d_total [tokens, C], the gradient of the sums; parts [tokens, 4, C], its high, middle, high and low."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    c = tl.arange(0, BC)[None, :]
    here = (n < tokens) & (c < C)
    of_gate = here & (c < G)
    slope = 1.0 / (1.0 + tl.exp(tl.load(z + n * G + c, mask=of_gate, other=0.0)))
    total = tl.load(dg + n * G + c, mask=of_gate, other=0.0) * slope / temperature
    total += tl.load(dm + n * (C - G) + c - G, mask=here & (c >= G), other=0.0)
    tl.store(d_total + n * C + c, total, mask=here)
    high, middle, low = three_parts(total)
    out = parts + n * (4 * C) + c
    tl.store(out, high, mask=here)
    tl.store(out + C, middle, mask=here)
    tl.store(out + 2 * C, high, mask=here)
    tl.store(out + 3 * C, low, mask=here)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Of bfloat16 matrices, in float32."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def rows_of(columns: int) -> dict[str, int]:
    """Tile of the kernels that have all columns of a few tokens."""
    wide = power_of_2(columns)
    return {"BN": max(1, min(64, NUMBERS // wide)), "BC": wide}


class Read(NamedTuple):
    """The tensors of a call."""

    x: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    bias_weight: Tensor
    bias: Tensor | None


class Back(NamedTuple):
    """Those of its backward: what it has read and left, and the gradients that come in."""

    x: Tensor
    z: Tensor
    parts: Tensor
    dg: Tensor
    dm: Tensor


def outputs(given: Read, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, m, and what the backward reads: the logits of the gates, and the parts of the weights."""
    x, gate_weight, gate_bias, bias_weight, bias = given
    steps = (
        x.stride(),
        gate_weight.stride(),
        bias_weight.stride(),
        gate_bias.stride(),
        None if bias is None else bias.stride(),
    )
    plan = plan_of(x.shape, len(gate_weight), len(bias_weight), steps, bias is None, float(temperature), x.device)
    return cast(Any, replayed(plan, given, lambda given: launched(given, float(temperature), plan)))


def launched(given: Read, temperature: float, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``outputs``. plan: of such calls."""
    x, gate_weight, gate_bias, bias_weight, bias = given
    (batch, length, dim), gates, biases = x.shape, gate_weight.shape[0], bias_weight.shape[0]
    tokens, columns = batch * length, gates + biases
    g = x.new_empty(batch, length, gates, dtype=torch.float32)
    z = x.new_empty(batch, length, gates, dtype=torch.float32)
    m = x.new_empty(batch, length, biases, dtype=torch.float32)
    parts = x.new_empty(4 * columns, dim)
    if not tokens:
        return g, m, z, parts
    of_parts = (gate_weight.contiguous(), bias_weight.contiguous(), parts)

    def split() -> Arguments:
        return columns * cdiv(dim, COLUMNS), (*of_parts, dim, gates, columns, COLUMNS), {}

    with on_device(x, dim=dim):
        launch_planned(plan, "split", split_weights_kernel, of_parts, split)
        y = product(x.reshape(tokens, dim), parts[columns:].mT)
        of_outputs = (y, gate_bias.contiguous(), None if bias is None else bias.contiguous(), g, m, z)

        def finish() -> Arguments:
            tile = rows_of(columns)
            args = (*of_outputs, tokens, temperature, gates, columns, tile["BN"], tile["BC"])
            return cdiv(tokens, tile["BN"]), args, {}

        launch_planned(plan, "outputs", outputs_kernel, of_outputs, finish)
    return g, m, z, parts


def gradients(
    given: Back, gates: int, temperature: float, needed: Sequence[bool], with_bias: bool
) -> tuple[Tensor | None, ...]:
    """Those of x, of both of the gates and both of the biases; None for what is not needed. gates: how many of the rows
    of weights are theirs."""
    steps = (given.x.stride(), given.dg.stride(), given.dm.stride())
    about = (given.x.shape, given.parts.shape, steps, gates, temperature, (*needed,), with_bias, given.x.device)
    plan = plan_of("back", *about)
    return replayed(plan, given, lambda given: launched_back(given, gates, temperature, needed, with_bias, plan))


def launched_back(
    given: Back, gates: int, temperature: float, needed: Sequence[bool], with_bias: bool, plan: Plan
) -> tuple[Tensor | None, ...]:
    """``gradients``. plan: of such calls."""
    x, z, of_weights, dg, dm = given
    (batch, length, dim), columns = x.shape, len(of_weights) // 4
    tokens, rows = batch * length, [gates, columns - gates]
    total = x.new_empty(tokens, columns, dtype=torch.float32)
    parts = x.new_empty(tokens, 4 * columns)
    tensors = (z, dg.contiguous(), dm.contiguous(), total, parts)

    def arguments() -> Arguments:
        tile = rows_of(columns)
        args = (*tensors, tokens, temperature, gates, columns, tile["BN"], tile["BC"])
        return cdiv(tokens, tile["BN"]), args, {}

    if tokens:
        with on_device(x, dim=dim):
            launch_planned(plan, "back", gradient_parts_kernel, tensors, arguments)
    of_x, *of_others = needed
    dx = None
    if of_x:  # high, high and middle of the weights
        dx = (parts[:, : 3 * columns] @ of_weights[: 3 * columns]).view(x.shape)
    d_weight: Any = (None, None)
    d_bias: Any = (None, None)
    if of_others[0] or of_others[2]:
        whole = product(parts[:, columns:].mT, x.reshape(tokens, dim)).view(3, columns, dim).sum(0)
        d_weight = torch.split_with_sizes(whole, rows)
    if of_others[1] or of_others[3]:
        d_bias = torch.split_with_sizes(total.sum(0), rows)
    return dx, d_weight[0], d_bias[0], d_weight[1], d_bias[1] if with_bias else None


@functools.lru_cache(maxsize=1024)
def plan_of(*facts: Any) -> Plan:
    """The launches of calls of these sizes and strides, float32 weights and tokens of bfloat16 with the same
    temperature and device."""
    return Plan()


@torch.library.custom_op("lizard_ops::gate_and_bias_parts", mutates_args=())
def unrecorded(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor, bias_weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """g and m without a gradient, as one operator for whoever looks at operators: the bits of ``_InParts``."""
    return outputs(Read(x, gate_weight, gate_bias, bias_weight, bias), temperature)[:2]


@unrecorded.register_fake
def _(x, gate_weight, gate_bias, bias_weight, bias, temperature):
    shape = x.shape[:2]
    return tuple(x.new_empty(*shape, len(weight), dtype=torch.float32) for weight in (gate_weight, bias_weight))


def gate_and_bias_in_parts(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor, bias_weight: Tensor, bias: Tensor | None, temperature: float,
    quiet: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``gate_and_bias`` of bfloat16 x [B, T, D], checked, on Triton; differentiable any number of times. quiet: nobody
    looks, and nothing is recorded."""
    given = Read(x, gate_weight, gate_bias, bias_weight, bias)
    if quiet:
        return outputs(given, temperature)[:2]
    if is_watched():  # by a mode, where nothing is recorded: ``takes_parts``
        return unrecorded(*given, float(temperature))
    return record_parts(*given, temperature)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.temperature = given
        g, m, z, parts = outputs(Read(*tensors), ctx.temperature)
        ctx.save_for_backward(*tensors, z, parts)
        return g, m

    @staticmethod
    def backward(ctx: Any, dg: Tensor, dm: Tensor) -> tuple[Tensor | None, ...]:
        *given, z, of_weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # the same, as functions of the inputs
            return _again(given, ctx, dg, dm)
        back, needed = Back(given[0], z, of_weights, dg, dm), ctx.needs_input_grad[:5]
        return *gradients(back, len(given[1]), float(ctx.temperature), needed, given[4] is not None), None


record_parts = recorded(_InParts)


def _again(given: Sequence[Tensor | None], ctx: Any, dg: Tensor, dm: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, differentiable."""
    x, gate_weight, gate_bias, bias_weight, bias = cast(Any, given)
    outputs = gate_and_bias_formula(x.float(), gate_weight, gate_bias, bias_weight, bias, ctx.temperature)
    wanted = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed and t is not None]
    found = iter(torch.autograd.grad(outputs, wanted, (dg, dm), create_graph=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None
