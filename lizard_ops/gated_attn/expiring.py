"""Keys in the order in which they enter the sums, where each has an expiry of its own, in plain PyTorch."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.row_decays import Decays, row_decays
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import Layout, gather_rows, key_stream, layout_of, per_head, with_kept
from lizard_ops.gated_attn.arguments import GatedInputs


class Entering(NamedTuple):
    """What becomes of the keys until the row at which they enter the sums."""

    decayed: Tensor  # [B, T, Hk or Hq] or [B, T, Hk, F] log decay of the row's key, float64; -inf where there is none
    left: Tensor | None  # [B, T, Hk or Hq] 0 where the row's query has a key that no reset came after, else -inf
    fields: dict[str, Tensor | None]  # of the final state: kept_fk and kept_g


def in_order_of_expiry(inputs: GatedInputs, lengths: Tensor | None, anchors: int) -> tuple[GatedInputs, Entering]:
    """Right-padded rows, their features and values gathered so that row i has the key that expires at i, and what
    became of it until then.

    At most one key of a head expires at a query: the one that leaves the window, or the one that it displaces.
    """
    v, g, expiry, state = inputs.v, inputs.g, inputs.expiry, inputs.initial_state
    assert expiry is not None
    (batch, rows, heads), length, device = expiry.shape, inputs.q.shape[1], expiry.device
    layout, held = layout_of(inputs.q, state, None, lengths), state or AttentionState(expiry)
    k = with_kept(key_stream(inputs.k, held.ring_fk, layout), held.kept_fk)
    v = with_kept(key_stream(v, held.ring_v, layout), held.kept_v)
    row = torch.arange(rows, device=device).view(1, -1, 1)
    is_key = expiry >= 0
    if state is None:
        is_key = row >= anchors if lengths is None else (row >= anchors) & (row < lengths.view(-1, 1, 1))
    ends = length if lengths is None else lengths.view(-1, 1, 1)
    at = torch.where(is_key & (expiry < ends), expiry, length)
    source = expiry.new_full((batch, length + 1, heads), -1)  # the last row is nobody's
    source = source.scatter(1, at, row.expand_as(expiry))[:, :length]

    kept, kept_g = inputs.kept_rows, None
    if g is None:
        decayed = v.new_zeros(source.shape, dtype=torch.float64)
    else:
        g = g.expand(-1, -1, heads, *g.shape[3:]) if g.shape[2] == 1 else g
        of_rows = decays_of(g, held, layout)
        decayed = of_rows.of(lambda x: x[:, rows - length :]).since(of_rows.of(partial(gather_rows, rows=source)))
        if kept is not None:
            end = of_rows.of(lambda x: x[:, -1:] if rows else x.new_zeros(batch, 1, *x.shape[2:]))
            kept_g = end.since(of_rows.of(partial(gather_rows, rows=kept)))
            kept_g = kept_g.masked_fill(per_head(kept, kept_g) < 0, 0.0).to(g.dtype)
    decayed = decayed.masked_fill(per_head(source, decayed) < 0, -math.inf)
    left = None if g is None else surviving(g, decayed, held.log_scale)
    fields = {} if kept is None else {"kept_fk": gather_rows(k, kept), "kept_g": kept_g}
    moved = inputs._replace(k=gather_rows(k, source), v=gather_rows(v, source), expiry=None, kept_rows=None)
    return moved, Entering(decayed, left, fields)


def decays_of(g: Tensor, state: AttentionState, layout: Layout) -> Decays:
    """Of the rows of a key stream; those of kept keys are what makes the difference to the newest token that of kept_g.

    g [B, T, Hk or Hq] or [B, T, Hk, F].
    """
    ring = state.ring_g
    gates = key_stream(g, None if ring is None else ring.expand(-1, -1, *g.shape[2:]), layout)
    sums, counts = of_rows = row_decays(gates)
    if state.kept_g is None or ring is None:
        return of_rows
    newest, reset = slice(ring.shape[1] - 1, ring.shape[1]), state.kept_g == -math.inf
    before = sums[:, newest] - state.kept_g.double().masked_fill(reset, 0.0)
    return Decays(torch.cat([before, sums], 1), torch.cat([counts[:, newest] - reset.long(), counts], 1))


def surviving(g: Tensor, decayed: Tensor, log_scale: Tensor | None) -> Tensor:
    """``Entering.left``: is there something that no reset of every channel came after since it entered?

    g [B, T, h] or [B, T, Hk, F] of the queries, decayed of the keys that enter at them, log_scale [B, h] of the sums
    before. What entered at a query is there as long as the count of resets is that of then.
    """
    if g.ndim == 4:
        g, decayed = g.amax(-1), decayed.amax(-1)
    resets = (g == -math.inf).cumsum(1)
    before = (
        torch.full_like(resets[:, :1], -1) if log_scale is None else (log_scale > -math.inf).long().unsqueeze(1) - 1
    )
    came = torch.cat([before, torch.where(decayed > -math.inf, resets, -1)], 1)
    return torch.where(came.cummax(1)[0][:, 1:] >= resets, 0.0, -math.inf).double()
