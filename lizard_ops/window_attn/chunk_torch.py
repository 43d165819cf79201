"""Sliding-window attention in plain PyTorch: blocks of queries against the blocks of keys that they can reach."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common.checks import work_dtype
from lizard_ops.common.numerics import logistic, soft_capped
from lizard_ops.common.rows import over_rows
from lizard_ops.common.sizes import is_known
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import anchor_rows, gather_rows, key_stream, layout_of, window_fields, with_kept
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions
from lizard_ops.window_attn.expiring import living, rows_at

BLOCK = 64  # queries a tile; for window 128 a tile then meets 192 keys, of which 128 count


def window_torch(inputs: WindowInputs, options: WindowOptions) -> tuple[Tensor, AttentionState | None, Tensor, Tensor]:
    """(o, state, lse, row maximum) of ``window_attn``, whose arguments come here checked."""

    def op(inputs, lengths):
        *results, fields = window_rows(inputs, lengths, options)
        position = layout_of(inputs.q, inputs.initial_state, None, lengths).end
        return results, AttentionState(position, **fields) if options.output_final_state else None

    (o, lse, row_max), state = over_rows(op, inputs, (0.0, -math.inf, -math.inf))
    return o.to(inputs.q.dtype), state, lse, row_max


def window_rows(
    inputs: WindowInputs,  # q [B, T, Hq, D], k [B, T, Hk, D], v [B, T, Hk, V], sinks [Hq, M]
    lengths: Tensor | None,  # [B], None: all T
    options: WindowOptions,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None]]:
    """Right-padded rows: (o [B, T, Hq, V], lse [B, T, Hq], row maximum [B, T, Hq], fields of the final state)."""
    q, k, v, sinks, state = inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.initial_state
    window, anchors = options.window, options.anchors
    (batch, length, heads, _), key_heads, work = q.shape, k.shape[2], work_dtype(q)
    group, prefix = heads // key_heads, 0 if state is None else window
    layout = layout_of(q, state, None, lengths)
    kept_k, kept_v = (None, None) if state is None else (state.anchor_k, state.anchor_v)
    anchor_k, anchor_v = anchor_rows(k, kept_k, anchors, layout), anchor_rows(v, kept_v, anchors, layout)
    fields = window_fields(k, v, anchor_k, anchor_v, state, window, layout)
    if not anchors:
        fields |= {"anchor_k": None, "anchor_v": None}

    size = max(1, min(BLOCK, window, length)) if is_known(length) else BLOCK
    expiry, places = inputs.expiry, options.kept_keys
    if expiry is not None:  # a block lists the living before those that it reaches: the longer it is, the fewer lists
        size = max(BLOCK, min(places, 4 * BLOCK))
        size = max(1, min(size, length)) if is_known(length) else size
    blocks, back = -(-length // size), -(-(window - 1) // size)
    stream_k, stream_v = key_stream(k, state and state.ring_k, layout), key_stream(v, state and state.ring_v, layout)
    if expiry is not None:
        if state is None:
            row = torch.arange(length, device=q.device).view(1, -1, 1)
            is_key = row >= anchors if lengths is None else (row >= anchors) & (row < lengths.view(-1, 1, 1))
            expiry = expiry.masked_fill(~is_key, 0)
        stream_k, stream_v = with_kept(stream_k, state and state.kept_k), with_kept(stream_v, state and state.kept_v)
        prefix = stream_k.shape[1] - length
    if inputs.kept_rows is not None:
        fields |= {"kept_k": gather_rows(stream_k, inputs.kept_rows), "kept_v": gather_rows(stream_v, inputs.kept_rows)}
    keys = _reach(stream_k.to(work), anchor_k.to(work), size, back, blocks, prefix)  # [B, Hk, n, A + S, D]
    values = _reach(stream_v.to(work), anchor_v.to(work), size, back, blocks, prefix)
    seen = near = _visible(layout.position, anchors, window, size, back, blocks)[:, None]  # [B, 1, n, C, A + S]
    if expiry is not None:
        if is_known(length):  # no block lists more keys than there are before those that the last one reaches
            places = min(places, max((blocks - 1 - back) * size, 0) + prefix)
        alive = living(expiry, blocks, size, back, places, prefix)
        keys = torch.cat([keys, rows_at(stream_k.to(work), alive)], 3)
        values = torch.cat([values, rows_at(stream_v.to(work), alive)], 3)
        seen = torch.cat([near | _kept(expiry, anchors, size, back, blocks, prefix), _listed(expiry, alive, size)], -1)
    queries = F.pad(q.to(work) * options.scale, (0, 0, 0, 0, 0, blocks * size - length))
    queries = queries.unflatten(2, (key_heads, group)).unflatten(1, (-1, size)).permute(0, 3, 1, 4, 2, 5)
    queries = queries.contiguous().flatten(3, 4)  # [B, Hk, n, G C, D]

    scores = soft_capped(queries @ keys.transpose(-1, -2), options.softcap).unflatten(3, (group, size))
    scores = scores.masked_fill_(~seen.unsqueeze(3), -math.inf).flatten(3, 4)
    o, lse, row_max = (x.unflatten(3, (group, size)) for x in SoftmaxAverage.apply(scores, values)[:3])

    def in_order(x: Tensor) -> Tensor:  # [B, Hk, n, G, C, ...] -> [B, T, Hq, ...]
        return x.movedim((2, 4), (1, 2)).reshape(batch, blocks * size, heads, *x.shape[5:])[:, :length]

    o, lse, row_max = in_order(o), in_order(lse), in_order(row_max)
    if sinks is not None:
        o, lse = with_sinks(o, lse, row_max, sinks.to(work), options.sink_form)
    if expiry is not None:  # the largest score of those that no expiry keeps
        scores = scores.unflatten(3, (group, size))[..., : near.shape[-1]]
        row_max = in_order(scores.masked_fill(~near.unsqueeze(3), -math.inf).amax(-1))
    return o, lse, row_max, fields


def with_sinks(o: Tensor, lse: Tensor, row_max: Tensor, sinks: Tensor, sink_form: str) -> tuple[Tensor, Tensor]:
    """Give the sinks [Hq, M] their share of the mass."""
    if sink_form == "exp":
        sink_lse = sinks.logsumexp(-1)
        total = torch.stack([lse, sink_lse.expand_as(lse)]).logsumexp(0)
        return o * logistic(lse - sink_lse).unsqueeze(-1), total
    mass = (lse - row_max).exp()
    total = mass + sinks.sum(-1) * (-row_max).exp()
    return o * (mass / total).unsqueeze(-1), row_max + total.log()


class SoftmaxAverage(torch.autograd.Function):
    """(o, log mass, row maximum) of score tiles [..., R, S] over values [..., S, V]; keeps one tile for the backward.

    The maximum passes its gradient to one key of largest score. The fourth output, the weights, is there for the
    backward alone, which is a function of them: a second derivative comes back through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row_max, weights = scores.amax(-1), scores.softmax(-1)
        return weights @ values, row_max - weights.amax(-1).log(), row_max, weights

    @staticmethod
    def setup_context(ctx, inputs, output):
        o, _, _, weights = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(o, weights, inputs[1])

    @staticmethod
    def backward(ctx, d_o, d_lse, d_max, d_weights):
        o, weights, values = ctx.saved_tensors
        d_o = torch.zeros_like(o) if d_o is None else d_o
        d_scores = d_values = None
        if ctx.needs_input_grad[1]:
            d_values = weights.transpose(-1, -2) @ d_o
        if ctx.needs_input_grad[0]:
            flow = (d_o * o).sum(-1)
            flow = flow if d_lse is None else flow - d_lse
            d_scores = d_o @ values.transpose(-1, -2)
            if d_weights is not None:
                flow = flow + (d_weights * weights).sum(-1)
                d_scores = d_scores + d_weights
            d_scores = d_scores.sub_(flow.unsqueeze(-1)).mul_(weights)
            if d_max is not None:
                d_scores.scatter_add_(-1, weights.argmax(-1, keepdim=True), d_max.unsqueeze(-1))
        return d_scores, d_values


def _reach(stream: Tensor, anchors: Tensor, size: int, back: int, blocks: int, prefix: int) -> Tensor:
    """Anchors and the rows that each block of queries can reach: [B, H, n, A + (back + 1) C, dim]."""
    front = back * size - prefix
    end = (blocks + back) * size - front - stream.shape[1]
    rows = F.pad(stream, (0, 0, 0, 0, front, end)).transpose(1, 2)
    reached = [rows[:, :, shift * size : (shift + blocks) * size] for shift in range(back + 1)]
    near = [part.unflatten(2, (-1, size)) for part in reached]
    return torch.cat([anchors.transpose(1, 2).unsqueeze(2).expand(-1, -1, blocks, -1, -1), *near], 3)


def _visible(position: Tensor, anchors: int, window: int, size: int, back: int, blocks: int) -> Tensor:
    """Which of the keys that ``_reach`` lays out count for each query: bool [N, n, C, A + S]."""
    device = position.device
    query = torch.arange(blocks * size, device=device).view(-1, size, 1)
    key = torch.arange(-back * size, size, device=device) + size * torch.arange(blocks, device=device).view(-1, 1, 1)
    start = position.view(-1, 1, 1, 1)
    near = (key <= query) & (key > query - window) & (key + start >= 0)
    far = torch.arange(anchors, device=device) <= query + start - window
    return torch.cat([far, near], -1)


def _kept(expiry: Tensor, anchors: int, size: int, back: int, blocks: int, prefix: int) -> Tensor:
    """Which of the keys that ``_reach`` lays out have not expired at each query: bool [B, Hk, n, C, A + S]."""
    none = expiry.new_zeros(expiry.shape[0], anchors, expiry.shape[2], 1)
    ends = _reach(expiry.unsqueeze(-1), none, size, back, blocks, prefix).squeeze(-1).unsqueeze(3)
    block = size * torch.arange(blocks, device=expiry.device).view(-1, 1, 1)
    query = torch.arange(size, device=expiry.device).view(-1, 1)
    key = torch.arange(-back * size - anchors, size, device=expiry.device)  # beside the anchors, which have expired
    return (ends > query + block) & (key <= query)


def _listed(expiry: Tensor, alive: Tensor, size: int) -> Tensor:
    """Which of the listed keys [B, Hk, n, P] have not expired at each query: bool [B, Hk, n, C, P]."""
    ends = rows_at(expiry.unsqueeze(-1), alive).squeeze(-1).masked_fill(alive < 0, 0).unsqueeze(3)
    queries = torch.arange(alive.shape[2] * size, device=expiry.device).view(-1, size, 1)
    return ends > queries
