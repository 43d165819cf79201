"""Scores as whole numbers in the order of keys, and what the displacements that a form finds say to the caller.

A *rank* is an int64 that is larger for the better of two keys: the score in its upper 32 bits, and in the lower ones
how early the key is. No two keys of a sequence share one, so a best ``kept_keys`` of any set is one set, and how it is
found (tile by tile, or all at once) cannot matter.

A key is numbered by its place in the stream of its sequence: the P kept keys that the call began with in the order of
their positions (empty places last), then the rows of ``common.streams.key_stream``, ring first.

Where heads have different numbers of places P is the largest, and the last of a head with fewer hold keys that are
better than any: of its P best the rest are the best of as many as it has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.places import Places, beyond, most
from lizard_ops.common.streams import Layout, final_ring, key_stream, layout_of, stream_seqlens
from lizard_ops.key_expiry.arguments import NEVER, ExpiryInputs, ExpiryOptions, Left

LOWEST = -(2**63 - 1)  # the rank of what is no key: below that of a score of -inf
LAST = 2**31 - 1  # the number that no key has
BLOCKED = (LAST << 32) + LAST  # less its number the rank of a place that a head does not have: above that of any score


def ranks_of(scores: Tensor, number: Tensor) -> Tensor:
    """Ranks of float32 scores, +0 and -0 being one score, of keys with these numbers."""
    bits = (scores + 0.0).view(torch.int32)
    in_order = torch.where(bits < 0, bits ^ LAST, bits)  # negative floats rise with their magnitude's bits
    return (in_order.long() << 32) + (LAST - number)


def blocked_ranks(places: tuple[int, ...], device: torch.device) -> Tensor:
    """[P, Hk] ranks of the places that heads do not have, ``LOWEST`` for those that they have."""
    none = beyond(places, device)
    number = torch.arange(none.shape[0], device=device).unsqueeze(1)
    return torch.where(none, BLOCKED - number, LOWEST)


def number_of(ranks: Tensor) -> Tensor:
    """The numbers of keys of these ranks; without a meaning for ``LOWEST``."""
    return LAST - (ranks & 0xFFFFFFFF)


def score_of(ranks: Tensor) -> Tensor:
    """The scores of keys of these ranks; without a meaning for ``LOWEST``."""
    in_order = (ranks >> 32).int()
    return torch.where(in_order < 0, in_order ^ LAST, in_order).view(torch.float32)


class RankedStream(NamedTuple):
    """The keys of a call, best first where they are kept ones, in order where they are rows."""

    rows: Tensor  # [B, M, Hk] ranks of the stream's rows, LOWEST for anchors and where there is no key
    kept: Tensor  # [N, P, Hk] ranks of the kept keys, descending, LOWEST in empty places
    positions: Tensor  # [N, P, Hk] where the kept keys stand, by number
    place: Tensor  # [N, P, Hk] the number of the key in each place of the state
    first: Tensor  # [N] position of row 0
    judged: Tensor  # [N] rows that leave the window in this call
    prefix: int  # rows of the ring
    ends: Tensor | None  # [N + 1] where packed streams start and end


def ranked_stream(inputs: ExpiryInputs, lengths: Tensor | None, options: ExpiryOptions) -> tuple[RankedStream, Layout]:
    """Rank what a call and its state hold: rows of a batch, right-padded to ``lengths``, or packed ones."""
    scores, state = inputs.scores, inputs.initial_state
    layout = layout_of(scores, state, inputs.cu_seqlens, lengths)  # type: ignore[arg-type]
    prefix = 0 if state is None else options.window
    first, end = layout.position - prefix, prefix + layout.length
    rows = key_stream(scores, None if state is None else state.ring_scores, layout)
    at = torch.arange(rows.shape[1], device=rows.device)
    if layout.cu_seqlens is None:
        ends, local, begin, stop = None, at.unsqueeze(0), first.unsqueeze(1), end.unsqueeze(1)
    else:
        ends = stream_seqlens(layout, prefix)
        owner = torch.searchsorted(ends, at, right=True) - 1
        local, begin, stop = (x.unsqueeze(0) for x in (at - ends[owner], first[owner], end[owner]))
    is_key = (begin + local >= options.anchors) & (begin + local >= 0) & (local < stop)
    places: Places = options.kept_keys
    ranks = ranks_of(rows, (most(places) + local).unsqueeze(-1)).masked_fill(~is_key.unsqueeze(-1), LOWEST)

    shape = (layout.start.shape[0], most(places), scores.shape[2])
    place = torch.arange(shape[1], device=rows.device).view(1, -1, 1).expand(shape)
    if state is None:
        kept = torch.full(shape, LOWEST, dtype=torch.int64, device=rows.device)
        positions = torch.full_like(kept, -1)
    else:
        positions, order = torch.where(state.kept_positions < 0, NEVER, state.kept_positions).sort(1)
        place = torch.zeros_like(order).scatter(1, order, place)
        kept = ranks_of(state.kept_scores, place).masked_fill(state.kept_positions < 0, LOWEST)
    if isinstance(places, tuple):  # the last numbers of a head are those of its empty places
        kept = torch.cat([kept, blocked_ranks(places, rows.device).expand_as(kept)], 1).topk(shape[1], 1)[0]
    elif state is not None:
        kept = kept.sort(1, descending=True)[0]
    judged = (end - options.window).clamp(min=0)
    return RankedStream(ranks, kept, positions, place, first, judged, prefix, ends), layout


Found = tuple[Tensor, Tensor, Tensor | None]  # what a form finds: see ``told``


def unkept(stream: RankedStream, options: ExpiryOptions) -> Found:
    """What is found without places: every key leaves when the window leaves it."""
    row = torch.arange(stream.rows.shape[1], device=stream.rows.device)
    if stream.ends is not None:
        row = row - stream.ends[torch.searchsorted(stream.ends, row, right=True) - 1]
    by_row = torch.where(stream.rows == LOWEST, -1, row.view(1, -1, 1))
    return stream.kept, by_row, stream.kept if options.output_final_state else None


def told(
    stream: RankedStream,
    layout: Layout,
    inputs: ExpiryInputs,
    options: ExpiryOptions,
    found: Found,
) -> tuple[Tensor, Left]:
    """(expiry of the new tokens [B, T, Hk], what is left) of what a form found.

    found: the row at which each kept key [N, P, Hk] (by number) and each row [B, M, Hk] is displaced, -1 where none
    does it; the ranks of those kept at the end [N, P, Hk], in any order, or None.
    """
    by_kept, by_row, kept = found
    state, window, prefix = inputs.initial_state, options.window, stream.prefix
    length, device = inputs.scores.shape[1], by_row.device
    n = layout.start.shape[0]
    if stream.ends is None:
        new, pending, owner = by_row[:, prefix:], by_row[:, :prefix], torch.arange(n, device=device).unsqueeze(1)
    else:
        at = torch.arange(length, device=device)
        owner = torch.searchsorted(layout.cu_seqlens, at, right=True) - 1  # type: ignore[arg-type]
        new = by_row.index_select(1, at + prefix * (owner + 1))
        ring = stream.ends[:-1].unsqueeze(1) + torch.arange(prefix, device=device)
        pending = by_row[0].index_select(0, ring.flatten()).unflatten(0, (n, prefix))
        owner = owner.unsqueeze(0)

    def expiry(row: Tensor, first: Tensor) -> Tensor:
        return torch.where(row < 0, NEVER, first.unsqueeze(-1) + row.long() + window)

    carried = None
    if state is not None:
        one = stream.first.unsqueeze(1)
        slot = torch.arange(window, device=device)
        order = (slot - layout.position.unsqueeze(1)) % window  # the stream row of each slot
        in_ring = pending.gather(1, order.unsqueeze(-1).expand_as(pending))
        carried = torch.cat([expiry(by_kept.gather(1, stream.place), one), expiry(in_ring, one)], 1)
    left = Left(layout.end, carried=carried)
    if kept is not None:
        number, real, places = number_of(kept), (kept != LOWEST) & (kept <= BLOCKED - LAST), kept.shape[1]
        before = stream.positions.gather(1, number.clamp(0, max(places - 1, 0)))
        position = stream.first.view(-1, 1, 1) + number - places
        position = torch.where(number < places, before, position).masked_fill(~real, NEVER)
        position, order = position.sort(1)
        scores = score_of(kept).masked_fill(~real, -torch.inf).gather(1, order)
        ring_scores = final_ring(inputs.scores, None if state is None else state.ring_scores, window, layout)
        empty = position == NEVER
        left = left._replace(
            kept_scores=scores, kept_positions=position.masked_fill(empty, -1), ring_scores=ring_scores,
            kept_numbers=number.gather(1, order).masked_fill(empty, -1),
        )  # fmt: skip
    return expiry(new, stream.first[owner]), left
