"""A step of the scores on the GPU, as an operator that updates the state where it lies."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from lizard_ops.common.checks import is_shape
from lizard_ops.common.dispatch import on_device
from lizard_ops.key_score.arguments import (
    INPUTS,
    LEAST_NORM,
    LEAST_RECEIVED,
    STATISTICS,
    KeyScoreState,
    KeyScoreWeights,
    ReceivedInputs,
    ReceivedWeights,
    StepInputs,
    copied,
)
from lizard_ops.key_score.triton.kernels import received_kernel, score_kernel
from lizard_ops.tiles.launch import Launch
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.softcap import cap_of, units_of
from lizard_ops.tiles.strided import rows_last
from lizard_ops.tuning import tunable

NUMBERS = 4096  # of the tile of heads and channels that a program has in registers
KEYS = 32768  # bytes of a tile of window keys


@tunable("key_score", fixed=("warps",))
def config_for(q: Tensor, window: int) -> Launch:
    """rows: of a tile of window keys. Not tuned."""
    width = max(16, triton.next_power_of_2(q.shape[3]))
    most = max(16, min(128, KEYS // (width * q.element_size())))
    return Launch(min(most, max(16, triton.next_power_of_2(window))), width, 4, 1)


def key_score_step_triton(inputs: StepInputs) -> tuple[Tensor, KeyScoreState]:
    """(scores [N, 1, Hk], state) of ``key_score_step``, whose arguments come here checked.

    torch.compile and tensors without data see the registered operator, whose dispatch takes longer than the kernels.
    """
    if not inputs.inplace:
        inputs = inputs._replace(state=copied(inputs.state))
    if not (torch.compiler.is_compiling() or is_shape(inputs.sums)):
        return launch(inputs), inputs.state
    given, x = (*inputs.weights, *inputs.state), inputs.received
    tensors = [None] * 9 if x is None else (x.q, x.k, x.ring_k, x.anchor_k, *x.weights)
    form = (1, 1.0, None) if x is None else (x.stride, x.scale, x.softcap)
    return step(inputs.sums, inputs.k, inputs.v, *given, *tensors, *form), inputs.state


def launch(inputs: StepInputs) -> Tensor:
    """One step, in place on the fields of the state; returns scores [N, 1, Hk]."""
    sums, k, v = rows_last(inputs.sums, inputs.k, inputs.v)
    state, received, (number, _, heads, dim) = inputs.state, inputs.received, inputs.k.shape
    units, v_dim = sums.shape[2] // INPUTS, v.shape[3]
    scores = sums.new_empty(number, 1, heads)
    if number == 0:
        return scores
    statistics = None if received is None else sums.new_empty(number, heads, STATISTICS)
    wide, deep, values = (triton.next_power_of_2(size) for size in (units, dim, v_dim))
    block = max(1, min(triton.next_power_of_2(heads), NUMBERS // max(wide, deep, values)))
    with on_device(sums, score_dim=units, dim=dim, values=v_dim):
        launch_kernel(
            score_kernel, number,
            sums, k, v, *(x.contiguous() for x in inputs.weights), *state[:4], scores, statistics,
            sums.stride(0), k.stride(0), k.stride(2), v.stride(0), v.stride(2), LEAST_NORM,
            S=units, HK=heads, D=dim, V=v_dim, BS=wide, BH=block, BD=deep, BV=values, num_warps=4, num_stages=1,
        )  # fmt: skip
        if received is None:
            return scores
        ring, kept_dtype = state.ring, received.ring_k.dtype
        q, new_k, ring_k, anchor_k = rows_last(received.q, received.k.to(kept_dtype), *received[2:4])
        anchors, anchor_steps = (0, (0, 0, 0)) if anchor_k is None else (anchor_k.shape[1], anchor_k.stride()[:3])
        window, width, group = ring_k.shape[1], received.weights.inner_bias.shape[1], q.shape[2] // heads
        config = config_for(q, window)
        launch_kernel(
            received_kernel, number * heads,
            q, new_k, ring_k, anchor_k, state.position, ring, statistics, scores,
            *(x.contiguous() for x in received.weights), q.stride(0), q.stride(2), new_k.stride(0), new_k.stride(2),
            *ring_k.stride()[:3], *anchor_steps, units_of(received.scale, received.softcap) / math.log(2),
            cap_of(received.scale, received.softcap), LEAST_RECEIVED,
            HK=heads, G=group, D=dim, W=window, A=anchors, STRIDE=received.stride, U=width,
            BG=max(16, triton.next_power_of_2(group)), BD=config.columns,
            BA=max(16, triton.next_power_of_2(anchors + 1)), BN=config.rows, BU=triton.next_power_of_2(width),
            SAME=q.dtype == kept_dtype, PRECISION="ieee", **config.options,
        )  # fmt: skip
    return scores


@torch.library.custom_op("lizard_ops::key_score_step", mutates_args=("position", "inner", "linear", "key_sum", "ring"))
def step(
    sums: Tensor,
    k: Tensor,
    v: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    linear_weight: Tensor,
    bias: Tensor,
    position: Tensor,
    inner: Tensor,
    linear: Tensor,
    key_sum: Tensor,
    ring: Tensor | None,
    q: Tensor | None,
    new_k: Tensor | None,
    ring_k: Tensor | None,
    anchor_k: Tensor | None,
    term_mean: Tensor | None,
    term_deviation: Tensor | None,
    term_inner_weight: Tensor | None,
    term_inner_bias: Tensor | None,
    term_outer_weight: Tensor | None,
    stride: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """``launch`` with every tensor on its own; those from q on are None without what is received."""
    weights, state = (inner_bias, outer_weight, linear_weight, bias), (position, inner, linear, key_sum, ring)
    received = None
    if q is not None:
        term = (term_mean, term_deviation, term_inner_weight, term_inner_bias, term_outer_weight)
        received = ReceivedInputs(q, new_k, ring_k, anchor_k, ReceivedWeights(*term), stride, scale, softcap)
    return launch(StepInputs(sums, k, v, KeyScoreWeights(*weights), KeyScoreState(*state), received, None, True))


@step.register_fake
def _(sums, k, *rest):
    return sums.new_empty(*k.shape[:3])
