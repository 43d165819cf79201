"""Which keys stay exact, one position at a time: the key that leaves the window against the worst one kept.

Where heads have different numbers of places they are chosen among padded scores and positions, and overwritten in the
list of all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.places import Places, beyond, padded, to_listed
from lizard_ops.common.state import AttentionState
from lizard_ops.common.steps import put_at, take_at
from lizard_ops.gated_attn.recurrent import Joining
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.key_expiry.arguments import NEVER

Fields = dict[str, Any]


class Taken(NamedTuple):
    """The place of each head that a key may take, and which heads let it."""

    at: tuple[Tensor, ...]  # index of what the places hold, as [B, Hk, ...]; anything where a head has none
    takes: Tensor  # [B, Hk]
    places: Places

    def put(self, kept: Tensor, new: Tensor, inplace: bool) -> Tensor:
        """kept [B, P, Hk, ...], or [B, S, ...], with new [B, Hk, ...] where it is taken; copies in the dtype of new."""
        at, takes = self.at, self.takes
        if isinstance(self.places, tuple):  # no two heads may write one place
            at, takes, new = (at[0], self.holders(at[1])), self.holders(takes), self.holders(new)
        return put_where(takes, kept, at, new, inplace)

    def holders(self, x: Tensor) -> Tensor:
        """Those of x [B, Hk, ...] of heads with places."""
        assert isinstance(self.places, tuple)
        some = [h for h, count in enumerate(self.places) if count]
        return x if len(some) == x.shape[1] else torch.stack([x[:, h] for h in some], 1)


def index_of(place: Tensor, places: Places) -> tuple[Tensor, ...]:
    """Where a place [B, Hk] of each head lies in [B, P, Hk, ...], or in [B, S, ...]."""
    row, head = (torch.arange(n, device=place.device) for n in place.shape)
    if not isinstance(places, tuple):
        return row.unsqueeze(1), place, head
    first = [sum(places[:h]) if count else 0 for h, count in enumerate(places)]
    return row.unsqueeze(1), torch.stack([place[:, h] + start for h, start in enumerate(first)], 1)


def keep_step(
    x: HybridInputs,  # of one token per row: scores [B, Hk], the rest as for the steps of the branches
    state: AttentionState,
    options: HybridOptions,
    inplace: bool = False,
) -> tuple[Fields, Joining | None]:
    """(the fields that changed but for the ring of keys and values, what enters the sums unless coverage="all").

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

    places: Places = options.kept_keys
    vacant = state.kept_positions < 0  # a step in place overwrites them
    held, kept_scores = padded(state.kept_positions, places, -1), padded(state.kept_scores, places, torch.inf)
    empty = held < 0
    if isinstance(places, tuple):
        none = beyond(places, held.device)
        empty, held = empty & ~none, held.masked_fill(none, -2)  # never the one to be taken where there are others
    worst = kept_scores.amin(1)  # of an empty place, where there is one: of these the first
    order = NEVER - torch.arange(held.shape[1], device=held.device).view(1, -1, 1)
    place = torch.where(kept_scores == worst.unsqueeze(1), torch.where(empty, order, held), -1).argmax(1)  # [B, Hk]
    free = empty.gather(1, place.unsqueeze(1)).squeeze(1)
    takes = leaves & (free | (score > worst))  # an equal one that is kept is earlier
    at = index_of(place, places)
    taken = Taken(at, takes, places)

    leaving_v, expiring_v = take_at(state.ring_v, slot), state.kept_v[at]

    def put(kept: Tensor, new: Tensor) -> Tensor:
        return taken.put(kept, new, inplace)

    fields |= {"kept_k": put(state.kept_k, take_at(state.ring_k, slot)), "kept_v": put(state.kept_v, leaving_v)}
    fields["kept_scores"] = put(state.kept_scores, score)
    fields["kept_positions"] = put(state.kept_positions, (position - window).unsqueeze(1).expand_as(place))
    if not options.outside:
        return fields, None

    assert state.ring_fk is not None
    leaving_fk, decay = take_at(state.ring_fk, slot), None
    fields["ring_fk"] = put_at(state.ring_fk, slot, x.fk, inplace)
    if x.g is not None:
        assert state.ring_g is not None
        fields["ring_g"] = put_at(state.ring_g, slot, x.g, inplace)
        decay = fields["ring_g"].sum(1)  # of the key that leaves the window
        decay = decay.expand(-1, max(decay.shape[1], place.shape[1]), *decay.shape[2:])
    if not options.late:
        return fields, Joining(k=leaving_fk, v=leaving_v, there=leaves.expand_as(place), decay=decay)

    assert state.kept_fk is not None
    expiring_fk = state.kept_fk[at]
    fields["kept_fk"] = put(state.kept_fk, leaving_fk)
    if x.g is not None:
        assert state.kept_g is not None and decay is not None
        passed = decay
        if isinstance(places, tuple):
            fields["kept_g"], decay = listed_decay_step(state.kept_g, x.g, passed, taken, vacant, inplace)
        else:
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


def listed_decay_step(
    kept_g: Tensor,  # [B, S], [B, S, G] with a gate per query head, or [B, S, F]
    g: Tensor,  # [B, 1 or Hk or Hq] or [B, Hk, F] of the new token
    passed: Tensor,  # the same, of the key that leaves the window, the new gate included
    taken: Taken,
    vacant: Tensor,  # [B, S]
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """``decay_step`` where heads have different numbers of places."""
    heads, places = taken.takes.shape[1], taken.places
    assert isinstance(places, tuple)
    apart = passed.ndim == 2 and passed.shape[1] > heads
    if apart:
        g, passed = g.unflatten(1, (heads, -1)), passed.unflatten(1, (heads, -1))
    g, passed = (x.expand(-1, heads, *x.shape[2:]) for x in (g, passed))
    each, vacant = to_listed(g, places), vacant.view(*vacant.shape, *[1] * (kept_g.ndim - 2))
    kept_g = kept_g.add_(each) if inplace else kept_g.to(each.dtype) + each
    kept_g = kept_g.masked_fill_(vacant, 0.0) if inplace else kept_g.masked_fill(vacant, 0.0)
    mine = taken.takes.view(*taken.takes.shape, *[1] * (passed.ndim - 2))
    decay = torch.where(mine, kept_g[taken.at], passed)
    return taken.put(kept_g, passed, inplace), decay.flatten(1, 2) if apart else decay


def put_where(takes: Tensor, kept: Tensor, at: tuple[Tensor, ...], new: Tensor, inplace: bool) -> Tensor:
    """kept with new [B, H, ...] at these places of its own where takes [B, H]; copies are in the dtype of new."""
    new = new.to(kept.dtype) if inplace else new
    kept = kept if inplace else kept.to(new.dtype)
    new = torch.where(takes.view(*takes.shape, *[1] * (new.ndim - 2)), new, kept[at])
    return kept.index_put_(at, new) if inplace else kept.index_put(at, new)
