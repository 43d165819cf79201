"""Which keys stay exact, one position at a time: the key that leaves the window against the worst one kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lizard_ops.common.state import AttentionState
from lizard_ops.common.steps import put_at, take_at
from lizard_ops.gated_attn.recurrent import Joining
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.key_expiry.arguments import NEVER

Fields = dict[str, Any]


def keep_step(
    x: HybridInputs,  # of one token per row: scores [B, Hk], the rest as for the steps of the branches
    state: AttentionState,
    options: HybridOptions,
    inplace: bool = False,
) -> tuple[Fields, Joining | None]:
    """(the fields that changed but for the ring of keys and values, what enters the sums of coverage="outside").

    To be called before the steps of the branches. Nothing is asked of the device, and every shape is fixed: where no
    key leaves, or the one that does takes no place, places are overwritten by what they hold. inplace: the fields are
    those of ``state``, overwritten.
    """
    assert state.kept_scores is not None and state.kept_positions is not None and state.ring_scores is not None
    assert state.kept_k is not None and state.kept_v is not None and x.scores is not None
    assert state.ring_k is not None and state.ring_v is not None
    window, position = options.window, state.position
    slot, arrival = position % window, position % (window - options.score_delay)
    score = take_at(state.ring_scores, arrival)  # of the key at position - window, [B, Hk]
    fields: Fields = {"ring_scores": put_at(state.ring_scores, arrival, x.scores, inplace)}
    leaves = (position >= window + options.anchors).unsqueeze(1)

    held, kept_scores = state.kept_positions, state.kept_scores
    empty = held < 0
    worst = kept_scores.amin(1)  # of an empty place, where there is one: of these the first
    order = NEVER - torch.arange(held.shape[1], device=held.device).view(1, -1, 1)
    place = torch.where(kept_scores == worst.unsqueeze(1), torch.where(empty, order, held), -1).argmax(1)  # [B, Hk]
    row, head = (torch.arange(n, device=held.device) for n in place.shape)
    at = (row.unsqueeze(1), place, head)
    free = empty[at]
    takes = leaves & (free | (score > worst))  # an equal one that is kept is earlier

    leaving_v, expiring_v = take_at(state.ring_v, slot), state.kept_v[at]

    def put(kept: Tensor, new: Tensor) -> Tensor:
        return put_where(takes, kept, at, new, inplace)

    fields |= {"kept_k": put(state.kept_k, take_at(state.ring_k, slot)), "kept_v": put(state.kept_v, leaving_v)}
    fields["kept_scores"] = put(kept_scores, score)
    fields["kept_positions"] = put(held, (position - window).unsqueeze(1).expand_as(place))
    if not options.outside:
        return fields, None

    assert state.ring_fk is not None and state.kept_fk is not None
    leaving_fk, expiring_fk, decay = take_at(state.ring_fk, slot), state.kept_fk[at], None
    fields |= {"ring_fk": put_at(state.ring_fk, slot, x.fk, inplace), "kept_fk": put(state.kept_fk, leaving_fk)}
    if x.g is not None:
        assert state.ring_g is not None and state.kept_g is not None
        fields["ring_g"] = put_at(state.ring_g, slot, x.g, inplace)
        passed = fields["ring_g"].sum(1).expand(-1, *state.kept_g.shape[2:])
        fields["kept_g"], decay = decay_step(state.kept_g, x.g, passed, takes, empty, place, inplace)
    joining = Joining(
        k=torch.where(takes.unsqueeze(-1), expiring_fk.to(leaving_fk.dtype), leaving_fk),
        v=torch.where(takes.unsqueeze(-1), expiring_v.to(leaving_v.dtype), leaving_v),
        there=leaves & ~free,
        decay=decay,
    )
    return fields, joining


def decay_step(
    kept_g: Tensor,  # [B, P, H] or [B, P, H, F], H key or query heads
    g: Tensor,  # [B, 1 or H] or [B, H, F] of the new token
    passed: Tensor,  # [B, H] or [B, H, F] of the key that leaves the window, the new gate included
    takes: Tensor,  # [B, Hk] whether it takes its place
    empty: Tensor,  # [B, P, Hk]
    place: Tensor,  # [B, Hk]
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """(kept_g after the new token, the log-decay [B, H] or [B, H, F] of the key that expires, of any if none does)."""
    heads = kept_g.shape[2]
    if heads > place.shape[1]:  # a gate per query head
        takes, empty, place = (x.repeat_interleave(heads // place.shape[1], -1) for x in (takes, empty, place))
    empty = empty.view(*empty.shape, *[1] * (kept_g.ndim - 3))
    kept_g = kept_g.add_(g.unsqueeze(1)) if inplace else kept_g.to(g.dtype) + g.unsqueeze(1)
    kept_g = kept_g.masked_fill_(empty, 0.0) if inplace else kept_g.masked_fill(empty, 0.0)
    row, head = (torch.arange(n, device=place.device) for n in place.shape)
    at = (row.unsqueeze(1), place, head)
    mine = takes.view(*takes.shape, *[1] * (passed.ndim - 2))
    decay = torch.where(mine, kept_g[at], passed)
    return put_where(takes, kept_g, at, passed, inplace), decay


def put_where(takes: Tensor, kept: Tensor, at: tuple[Tensor, ...], new: Tensor, inplace: bool) -> Tensor:
    """kept [B, P, H, ...] with new [B, H, ...] at these places where takes [B, H]; copies are in the dtype of new."""
    new = new.to(kept.dtype) if inplace else new
    kept = kept if inplace else kept.to(new.dtype)
    new = torch.where(takes.view(*takes.shape, *[1] * (new.ndim - 2)), new, kept[at])
    return kept.index_put_(at, new) if inplace else kept.index_put(at, new)
