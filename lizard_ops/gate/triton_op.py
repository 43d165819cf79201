"""Gate and merge bias of a few tokens in one kernel, and as torch.library sees it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.direct import direct
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.sizes import power_of_2
from lizard_ops.tiles.launcher import launch_kernel

CHANNELS = 4096  # of x that a program has in registers at once


@triton.jit
def log_sigmoid(z):
    """-log(1 + exp(-z)), to the last bits where it is small: log(1 + e) is off by as much as 1 + e is rounded."""
    e = tl.exp(-tl.abs(z))
    rounded = 1.0 + e
    beyond = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    return tl.minimum(z, 0.0) - tl.where(rounded == 1.0, e, tl.log(rounded) * (e / beyond))


@triton.jit
def one_number(
    pid, x, gate_weight, gate_bias, bias_weight, bias, g, m, temperature,
    D: tl.constexpr, G: tl.constexpr, H: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One number of one token: a gate by the first G programs of it, a merge bias by the other H."""
    row = tl.cast(pid // (G + H), tl.int64)
    i = pid % (G + H)
    weight = gate_weight + i * D
    if i >= G:
        weight = bias_weight + (i - G) * D
    acc = tl.zeros([BD], tl.float32)
    for block in tl.static_range((D + BD - 1) // BD):
        d = block * BD + tl.arange(0, BD)
        b_x = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        acc += b_x * tl.load(weight + d, mask=d < D, other=0.0)
    total = tl.sum(acc, 0)
    if i < G:
        tl.store(g + row * G + i, log_sigmoid(total + tl.load(gate_bias + i)) / temperature)
    else:
        if bias is not None:
            total += tl.load(bias + i - G)
        tl.store(m + row * H + i - G, total)


@triton.jit(do_not_specialize=["temperature"])
def gate_and_bias_kernel(
    x, gate_weight, gate_bias, bias_weight, bias, g, m, temperature,
    D: tl.constexpr, G: tl.constexpr, H: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``one_number`` a program."""
    one_number(tl.program_id(0), x, gate_weight, gate_bias, bias_weight, bias, g, m, temperature, D, G, H, BD)


def columns_of(dim: int) -> int:
    """Channels that a program has at once."""
    return min(CHANNELS, power_of_2(dim))


@torch.library.custom_op("lizard_ops::gate_and_bias", mutates_args=())
def both(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    bias_weight: Tensor,
    bias: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """(g [B, T, G], m [B, T, H]) float32 of x [B, T, D]."""
    x, gate_weight, gate_bias, bias_weight = (t.contiguous() for t in (x, gate_weight, gate_bias, bias_weight))
    bias = None if bias is None else bias.contiguous()
    (batch, length, dim), gates, biases = x.shape, gate_weight.shape[0], bias_weight.shape[0]
    g = x.new_empty(batch, length, gates, dtype=torch.float32)
    m = x.new_empty(batch, length, biases, dtype=torch.float32)
    programs = batch * length * (gates + biases)
    if programs:
        with on_device(x):
            launch_kernel(
                gate_and_bias_kernel, programs,
                x, gate_weight, gate_bias, bias_weight, bias, g, m, temperature,
                D=dim, G=gates, H=biases, BD=columns_of(dim), num_warps=4,  # as in ``token_heads``
            )  # fmt: skip
    return g, m


@both.register_fake
def _(x, gate_weight, gate_bias, bias_weight, bias, temperature):
    sizes = (gate_weight.shape[0], bias_weight.shape[0])
    return tuple(x.new_empty(*x.shape[:2], size, dtype=torch.float32) for size in sizes)


def gate_and_bias_triton(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    bias_weight: Tensor,
    bias: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Both, where no gradient is recorded."""
    given = (x, gate_weight, gate_bias, bias_weight, bias)
    return direct(both, *given)(*given, temperature)
