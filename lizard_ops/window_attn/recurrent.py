"""Sliding-window attention one position at a time: the window branch of the recurrent hybrid op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common.checks import work_dtype
from lizard_ops.common.numerics import soft_capped
from lizard_ops.common.state import AttentionState
from lizard_ops.common.steps import put_at
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions
from lizard_ops.window_attn.chunk_torch import with_sinks


def window_step(
    inputs: WindowInputs,  # of one token per row: q [B, Hq, D], k [B, Hk, D], v [B, Hk, V], sinks [Hq, M]
    state: AttentionState,
    options: WindowOptions,
    inplace: bool = False,
    kept: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None]]:
    """One token per row: (o [B, Hq, V], lse [B, Hq], row maximum [B, Hq], the fields that changed).

    inplace: the fields are those of ``state``, overwritten.
    kept: keys [B, P, Hk, D] and values [B, P, Hk, V] of other places, seen but for the maximum, positions [B, P, Hk] of
    the keys, -1 for none.
    """
    q, k, v, sinks = inputs.q, inputs.k, inputs.v, inputs.sinks
    window, anchors, softcap = options.window, options.anchors, options.softcap
    assert state.ring_k is not None and state.ring_v is not None
    work, position = work_dtype(q), state.position.unsqueeze(1)
    slot = torch.arange(window, device=q.device)
    newest = state.position % window
    ring_k, ring_v = (put_at(x, newest, new, inplace) for x, new in ((state.ring_k, k), (state.ring_v, v)))
    fields: dict[str, Tensor | None] = {"ring_k": ring_k, "ring_v": ring_v}
    queries = q.to(work).unflatten(1, (k.shape[1], -1)) * options.scale  # [B, Hk, G, D]
    scores = _scores(queries, ring_k, slot <= position, softcap)  # slots fill in order, then all hold a key
    if anchors:
        assert state.anchor_k is not None and state.anchor_v is not None
        place = torch.arange(anchors, device=q.device)
        own = (place == position)[:, :, None, None]
        anchor_k = torch.where(own, k.unsqueeze(1), state.anchor_k.to(k.dtype))
        anchor_v = torch.where(own, v.unsqueeze(1), state.anchor_v.to(v.dtype))
        if inplace:
            anchor_k, anchor_v = state.anchor_k.copy_(anchor_k), state.anchor_v.copy_(anchor_v)
        fields |= {"anchor_k": anchor_k, "anchor_v": anchor_v}
        scores = torch.cat([scores, _scores(queries, anchor_k, place <= position - window, softcap)], -1)
    row_max = scores.amax(-1).flatten(1)
    if kept is not None:
        scores = torch.cat([scores, _scores(queries, kept[0], kept[2] >= 0, softcap)], -1)
    weights = scores.softmax(-1)
    lse = scores.logsumexp(-1).flatten(1)
    o = weights[..., :window] @ ring_v.to(work).transpose(1, 2)
    if anchors:
        o = o + weights[..., window : window + anchors] @ anchor_v.to(work).transpose(1, 2)
    if kept is not None:
        o = o + weights[..., window + anchors :] @ kept[1].to(work).transpose(1, 2)
    o = o.flatten(1, 2)
    if sinks is not None:
        o, lse = with_sinks(o, lse, row_max, sinks.to(work), options.sink_form)
    return o, lse, row_max, fields


def _scores(queries: Tensor, keys: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """[B, Hk, G, M]: queries [B, Hk, G, D] against keys [B, M, Hk, D], -inf where not seen [B, M] or [B, M, Hk]."""
    scores = soft_capped(queries @ keys.to(queries.dtype).permute(0, 2, 3, 1), softcap)
    seen = seen.unsqueeze(1) if seen.ndim == 2 else seen.transpose(1, 2)
    return scores.masked_fill(~seen.unsqueeze(2), -math.inf)
