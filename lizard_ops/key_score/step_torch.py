"""A step of the scores in PyTorch: one token of each sequence. It has gradients but for what a key receives."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common.checks import work_dtype
from lizard_ops.common.numerics import soft_capped
from lizard_ops.common.state import map_fields
from lizard_ops.key_score.arguments import (
    INPUTS,
    LEAST_NORM,
    LEAST_RECEIVED,
    LOOK_AHEAD,
    STATISTICS,
    KeyScoreState,
    ReceivedInputs,
    ReceivedWeights,
    StepInputs,
)


def key_score_step_torch(inputs: StepInputs) -> tuple[Tensor, KeyScoreState]:
    """(scores [N, 1, Hk], state) of ``key_score_step``, whose arguments come here checked.

    As few operations as it can be: each is a launch on a GPU.
    """
    weights, state = inputs.weights, inputs.state
    k, v = (t[:, 0].to(inputs.sums.dtype) for t in (inputs.k, inputs.v))
    first, second, third, fourth = inputs.sums[:, 0].unflatten(-1, (INPUTS, -1)).unbind(1)
    key_sum = state.key_sum + F.normalize(k, dim=-1, eps=LEAST_NORM).double()
    statistics = _statistics(k, v, key_sum)
    linear = torch.einsum("nhf,hf->nh", statistics, weights.linear_weight)
    inner = F.gelu(state.inner[:, 0] + fourth + weights.inner_bias)
    scores = F.linear(inner, weights.outer_weight) + state.linear[:, 0] + weights.bias
    scores = scores.masked_fill((state.position < LOOK_AHEAD)[:, None], 0.0)
    new = KeyScoreState(
        state.position + 1,
        torch.stack([state.inner[:, 1] + third, state.inner[:, 2] + second, first], 1),
        torch.stack([state.linear[:, 1], linear], 1),
        key_sum,
    )
    if inputs.received is not None:
        assert state.ring is not None
        left, ring = _through_ring(inputs.received, statistics, scores, state.position, state.ring)
        scores = left[..., STATISTICS] + received_term(left, inputs.received.weights)
        known = state.position >= ring.shape[1] - 1
        scores, new = scores.masked_fill(~known[:, None], 0.0), new._replace(ring=ring)
    if inputs.padding_mask is not None:
        scores = scores.masked_fill(~inputs.padding_mask, 0.0)
        new = map_fields(partial(_chosen, inputs.padding_mask), new, state)
    if not inputs.inplace:
        return scores[:, None], new
    map_fields(Tensor.copy_, state, new)
    return scores[:, None], state


def received_term(left: Tensor, weights: ReceivedWeights) -> Tensor:
    """[N, Hk] of the seven numbers [N, Hk, 7] of a key that has received all."""
    facts = torch.cat([left[..., :STATISTICS], left[..., STATISTICS + 1 :].clamp(min=LEAST_RECEIVED).log()], -1)
    plain = (facts - weights.mean) / weights.deviation
    inner = F.gelu(torch.einsum("nhf,hfu->nhu", plain, weights.inner_weight) + weights.inner_bias)
    return (inner * weights.outer_weight).sum(-1)


def _chosen(real: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(real.view(-1, *[1] * (new.ndim - 1)), new, old)


def _statistics(k: Tensor, v: Tensor, key_sum: Tensor) -> Tensor:
    """[N, Hk, 3]."""
    norms = [torch.linalg.vector_norm(t, dim=-1).clamp(min=LEAST_NORM).log() for t in (k, v)]
    return torch.stack([*norms, F.cosine_similarity(k, key_sum.to(k.dtype), dim=-1, eps=LEAST_NORM)], -1)


def _through_ring(
    received: ReceivedInputs, statistics: Tensor, base: Tensor, position: Tensor, ring: Tensor
) -> tuple[Tensor, Tensor]:
    """(the seven numbers [N, Hk, 7] of the key W - 1 tokens before, the ring after the token)."""
    window, at = ring.shape[1], position[:, None]
    age = (at + torch.arange(window - 1, -1, -1, device=ring.device)) % window  # [N, W]; 0: the key just before
    total, largest = _given(received, position, age)  # [N, W, Hk], 0 for the new key's place
    newest, waiting, counts = (t[..., None] for t in (age == window - 1, age == LOOK_AHEAD - 1, age))
    counts = (counts + 1) * ((at + 1) % received.stride == 0)[..., None]
    counted, late = counts >= LOOK_AHEAD, counts >= window * 3 // 4
    ring = ring.masked_fill(newest[..., None], 0.0)
    others = [
        torch.where(waiting, base[:, None], ring[..., STATISTICS]),
        ring[..., -3] + total * counted,
        ring[..., -2] + total * late,
        torch.maximum(ring[..., -1], largest * counted),
    ]
    known = torch.where(newest[..., None], statistics[:, None], ring[..., :STATISTICS])
    ring = torch.cat([known, *(t[..., None] for t in others)], -1)
    place = ((position + 1) % window).view(-1, 1, 1, 1).expand(-1, -1, *ring.shape[2:])
    return ring.gather(1, place)[:, 0], ring


@torch.no_grad()
def _given(received: ReceivedInputs, position: Tensor, age: Tensor) -> tuple[Tensor, Tensor]:
    """What the token gives to the keys of the ring: weights summed over the group and the largest, [N, W, Hk] each.

    age [N, W]: tokens between the key in a place and the new one. Where that is W - 1 the new key will stand.
    """
    ring_k, window = received.ring_k, age.shape[1]
    hidden, keys = [age >= position[:, None].clamp(max=window - 1)], [ring_k]
    if received.anchor_k is not None:
        anchors = torch.arange(received.anchor_k.shape[1], device=age.device)
        hidden.append(anchors > position[:, None] - window)
        keys.append(received.anchor_k)
    hidden.append(position[:, None] < 0)
    keys.append(received.k.to(ring_k.dtype))
    k = torch.cat([t.transpose(1, 2) for t in keys], 2)
    q, work = received.q[:, 0].unflatten(1, (k.shape[1], -1)), work_dtype(received.q)
    logits = soft_capped((q.to(work) * received.scale) @ k.to(work).transpose(-1, -2), received.softcap)
    shares = logits.masked_fill(torch.cat(hidden, 1)[:, None, None], -torch.inf).softmax(-1)[..., :window]
    return shares.sum(-2).transpose(1, 2), shares.amax(-2).transpose(1, 2)
