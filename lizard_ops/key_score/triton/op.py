"""A step of the scores on the GPU, as an operator that updates the state where it lies."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.key_score.arguments import LEAST_NORM, LEAST_RECEIVED, KeyScoreState, StepInputs, copied
from lizard_ops.key_score.triton.kernels import received_kernel, score_kernel
from lizard_ops.tiles.launch import Launch
from lizard_ops.tiles.softcap import cap_of, units_of
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
    """(scores [N, 1, Hk], state) of ``key_score_step``, whose arguments come here checked."""
    state = inputs.state if inputs.inplace else copied(inputs.state)
    received = inputs.received
    given: dict = {}
    if received is not None:
        names = ("q", "ring_k", "anchor_k", "stride", "scale", "softcap")
        given = {name: getattr(received, name) for name in names} | {"new_k": received.k}
        given |= {f"term_{name}": x for name, x in received.weights._asdict().items()}
    scores = step(inputs.sums, inputs.k, inputs.v, *inputs.weights, *state, **given)
    return scores, state


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
    q: Tensor | None = None,
    new_k: Tensor | None = None,
    ring_k: Tensor | None = None,
    anchor_k: Tensor | None = None,
    term_mean: Tensor | None = None,
    term_deviation: Tensor | None = None,
    term_inner_weight: Tensor | None = None,
    term_inner_bias: Tensor | None = None,
    term_outer_weight: Tensor | None = None,
    stride: int = 1,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """One step, in place on the fields of the state; returns scores [N, 1, Hk]."""
    sums, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (sums, k, v))
    number, _, heads, dim = k.shape
    units, v_dim = sums.shape[2] // 4, v.shape[3]
    scores = sums.new_empty(number, 1, heads)
    if number == 0:
        return scores
    statistics = None if ring is None else sums.new_empty(number, heads, 3)
    wide, deep, values = (triton.next_power_of_2(size) for size in (units, dim, v_dim))
    block = max(1, min(triton.next_power_of_2(heads), NUMBERS // max(wide, deep, values)))
    with on_device(sums, score_dim=units, dim=dim, values=v_dim):
        score_kernel[(number,)](
            sums, k, v, inner_bias.contiguous(), outer_weight.contiguous(), linear_weight.contiguous(),
            bias.contiguous(), position, inner, linear, key_sum, scores, statistics,
            sums.stride(0), k.stride(0), k.stride(2), v.stride(0), v.stride(2), LEAST_NORM,
            S=units, HK=heads, D=dim, V=v_dim, BS=wide, BH=block, BD=deep, BV=values, num_warps=4, num_stages=1,
        )  # fmt: skip
        if ring is None:
            return scores
        q, new_k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, new_k.to(ring_k.dtype)))
        ring_k, anchor_k = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (ring_k, anchor_k))
        anchors, anchor_steps = (0, (0, 0, 0)) if anchor_k is None else (anchor_k.shape[1], anchor_k.stride()[:3])
        window, width, group = ring.shape[1], term_inner_bias.shape[1], q.shape[2] // heads
        config = config_for(q, window)
        received_kernel[(number * heads,)](
            q, new_k, ring_k, anchor_k, position, ring, statistics, scores, term_mean.contiguous(),
            term_deviation.contiguous(), term_inner_weight.contiguous(), term_inner_bias.contiguous(),
            term_outer_weight.contiguous(), q.stride(0), q.stride(2), new_k.stride(0), new_k.stride(2),
            *ring_k.stride()[:3], *anchor_steps, units_of(scale, softcap) / math.log(2), cap_of(scale, softcap),
            LEAST_RECEIVED,
            HK=heads, G=group, D=dim, W=window, A=anchors, STRIDE=stride, U=width,
            BG=max(16, triton.next_power_of_2(group)), BD=config.columns,
            BA=max(16, triton.next_power_of_2(anchors + 1)), BN=config.rows, BU=triton.next_power_of_2(width),
            SAME=q.dtype == ring_k.dtype, PRECISION="ieee", **config.options,
        )  # fmt: skip
    return scores


@step.register_fake
def _(sums, k, *rest, **named):
    return sums.new_empty(*k.shape[:3])
