"""Gate and merge bias of many bfloat16 tokens: products of matrices with the float32 weights as sums of three parts.

A float32 number is the sum of three of bfloat16, so products of these on tensor cores, summed in float32, are those of
float32, which a GPU forms on slower units and from a float32 copy of the tokens.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import is_watched, recorded
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.gate.formula import gate_and_bias_formula
from lizard_ops.gate.triton_op import log_sigmoid
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned

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


def outputs(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor, bias_weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, m, and what the backward reads: the logits of the gates, and the parts of the weights."""
    (batch, length, dim), gates, biases = x.shape, gate_weight.shape[0], bias_weight.shape[0]
    tokens, columns = batch * length, gates + biases
    g = x.new_empty(batch, length, gates, dtype=torch.float32)
    z = x.new_empty(batch, length, gates, dtype=torch.float32)
    m = x.new_empty(batch, length, biases, dtype=torch.float32)
    parts = x.new_empty(4 * columns, dim)
    if not tokens:
        return g, m, z, parts
    plan = plan_of(tokens, dim, gates, biases, bias is None, float(temperature), x.device)
    of_parts = (gate_weight.contiguous(), bias_weight.contiguous(), parts)

    def split() -> Arguments:
        return columns * cdiv(dim, COLUMNS), (*of_parts, dim, gates, columns, COLUMNS), {}

    with on_device(x, dim=dim):
        launch_planned(plan, "split", split_weights_kernel, of_parts, split)
        y = product(x.reshape(tokens, dim), parts[columns:].mT)
        of_outputs = (y, gate_bias.contiguous(), None if bias is None else bias.contiguous(), g, m, z)

        def finish() -> Arguments:
            tile = rows_of(columns)
            args = (*of_outputs, tokens, float(temperature), gates, columns, tile["BN"], tile["BC"])
            return cdiv(tokens, tile["BN"]), args, {}

        launch_planned(plan, "outputs", outputs_kernel, of_outputs, finish)
    return g, m, z, parts


@functools.lru_cache(maxsize=1024)
def plan_of(*facts: Any) -> Plan:
    """The launches of these sizes, float32 weights and tokens of bfloat16 with the same temperature and device."""
    return Plan()


@torch.library.custom_op("lizard_ops::gate_and_bias_parts", mutates_args=())
def unrecorded(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor, bias_weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """g and m without a gradient, as one operator for whoever looks at operators: the bits of ``_InParts``."""
    return outputs(x, gate_weight, gate_bias, bias_weight, bias, temperature)[:2]


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
    given = (x, gate_weight, gate_bias, bias_weight, bias)
    if quiet:
        return outputs(*given, temperature)[:2]
    if is_watched():  # by a mode, where nothing is recorded: ``takes_parts``
        return unrecorded(*given, float(temperature))
    return record_parts(*given, temperature)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        gate_weight, gate_bias, bias_weight, bias, temperature = given
        g, m, z, parts = outputs(x, *given)
        ctx.save_for_backward(x, gate_weight, gate_bias, bias_weight, bias, z, parts)
        ctx.temperature = temperature
        return g, m

    @staticmethod
    def backward(ctx: Any, dg: Tensor, dm: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_weight, gate_bias, bias_weight, bias, z, of_weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # the same, as functions of the inputs
            return _again((x, gate_weight, gate_bias, bias_weight, bias), ctx, dg, dm)
        (batch, length, dim), gates, biases = x.shape, gate_weight.shape[0], bias_weight.shape[0]
        tokens, columns = batch * length, gates + biases
        total = x.new_empty(tokens, columns, dtype=torch.float32)
        parts = x.new_empty(tokens, 4 * columns)
        if tokens:
            tile = rows_of(columns)
            with on_device(x, dim=dim):
                launch_kernel(
                    gradient_parts_kernel, cdiv(tokens, tile["BN"]),
                    z, dg.contiguous(), dm.contiguous(), total, parts, tokens, float(ctx.temperature),
                    G=gates, C=columns, **tile,
                )  # fmt: skip
        of_x, *needed = ctx.needs_input_grad[:5]
        dx = None
        if of_x:  # high, high and middle of the weights
            dx = (parts[:, : 3 * columns] @ of_weights[: 3 * columns]).view(x.shape)
        d_weight = d_bias = (None, None)
        if needed[0] or needed[2]:
            whole = product(parts[:, columns:].mT, x.reshape(tokens, dim)).view(3, columns, dim).sum(0)
            d_weight = whole.split([gates, biases])
        if needed[1] or needed[3]:
            d_bias = total.sum(0).split([gates, biases])
        return dx, d_weight[0], d_bias[0], d_weight[1], None if bias is None else d_bias[1], None


record_parts = recorded(_InParts)


def _again(given: tuple[Tensor | None, ...], ctx: Any, dg: Tensor, dm: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, differentiable."""
    x, gate_weight, gate_bias, bias_weight, bias = cast(Any, given)
    outputs = gate_and_bias_formula(x.float(), gate_weight, gate_bias, bias_weight, bias, ctx.temperature)
    wanted = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed and t is not None]
    found = iter(torch.autograd.grad(outputs, wanted, (dg, dm), create_graph=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:5]), None
