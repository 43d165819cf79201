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
    free = at_place(empty, place)
    takes = leaves & (free | (score > worst))  # an equal one that is kept is earlier
    leaving_v = take_at(state.ring_v, slot)
    expiring_v = at_place(state.kept_v, place)
    leaving: Fields = {"kept_k": take_at(state.ring_k, slot), "kept_v": leaving_v}
    leaving |= {"kept_scores": score, "kept_positions": (position - window).unsqueeze(1).expand_as(place)}
    if not options.outside:
        return fields | {n: put_at_place(getattr(state, n), place, takes, y, inplace) for n, y in leaving.items()}, None

    assert state.ring_fk is not None and state.kept_fk is not None
    leaving_fk, expiring_fk = take_at(state.ring_fk, slot), at_place(state.kept_fk, place)
    fields["ring_fk"] = put_at(state.ring_fk, slot, x.fk, inplace)
    leaving["kept_fk"] = leaving_fk
    decay, g = None, x.g
    if g is not None:
        assert state.ring_g is not None and state.kept_g is not None
        fields["ring_g"] = put_at(state.ring_g, slot, g, inplace)
        passed = fields["ring_g"].sum(1).expand(-1, *state.kept_g.shape[2:])
        none = empty.repeat_interleave(state.kept_g.shape[2] // empty.shape[2], 2)
        none = none.view(*none.shape, *[1] * (state.kept_g.ndim - 3))
        kept_g = state.kept_g.add_(g.unsqueeze(1)) if inplace else state.kept_g.to(g.dtype) + g.unsqueeze(1)
        kept_g = kept_g.masked_fill_(none, 0.0) if inplace else kept_g.masked_fill(none, 0.0)
        decay = chosen(takes, at_place(kept_g, place), passed)
        fields["kept_g"] = put_at_place(kept_g, place, takes, passed, inplace)
    joining = Joining(
        k=chosen(takes, expiring_fk.to(leaving_fk.dtype), leaving_fk),
        v=chosen(takes, expiring_v.to(leaving_v.dtype), leaving_v),
        there=leaves & ~free,
        decay=decay,
    )
    fields |= {n: put_at_place(getattr(state, n), place, takes, y, inplace) for n, y in leaving.items()}
    return fields, joining


def at_place(kept: Tensor, place: Tensor) -> Tensor:
    """[B, H, ...]: what kept [B, P, H, ...] holds at place [B, Hk] of each head, or of the key head of a query head."""
    return kept[_indices(kept, place)]


def put_at_place(kept: Tensor, place: Tensor, takes: Tensor, new: Tensor, inplace: bool) -> Tensor:
    """kept [B, P, H, ...] with new [B, H, ...] at place [B, Hk] where takes [B, Hk]; copies are in the dtype of new."""
    at = _indices(kept, place)
    if inplace:
        return kept.index_put_(at, chosen(takes, new.to(kept.dtype), kept[at]))
    kept = kept.to(new.dtype)
    return kept.index_put(at, chosen(takes, new, kept[at]))


def chosen(takes: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[B, H, ...]: a where takes [B, Hk], b elsewhere."""
    takes = takes.repeat_interleave(a.shape[1] // takes.shape[1], 1)
    return torch.where(takes.view(*takes.shape, *[1] * (a.ndim - 2)), a, b)


def _indices(kept: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row, head = (torch.arange(n, device=kept.device) for n in (kept.shape[0], kept.shape[2]))
    return row.unsqueeze(1), place.repeat_interleave(kept.shape[2] // place.shape[1], 1), head.unsqueeze(0)
