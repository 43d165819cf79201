"""What the scores of keys carry until their keys leave the window: a ring of a place per position in the window.

A place holds, per key head, seven numbers: three statistics of its key, its score but for the term of what it received
(zero until it is known), and sum, late sum and maximum of what it has received so far. The key at position p stands in
place p % W. Shapes: N sequences in B rows of T tokens, W window, Hk key heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_layers.config import LOOK_AHEAD
from lizard_layers.received import SUMS, InWindow, Received, WindowForm
from lizard_layers.received_bands import FromStart, received_by
from lizard_layers.token_order import TokenOrder, wide

STATISTICS = 3  # log norm of the key, log norm of the value, likeness to the mean key
RING = STATISTICS + 1 + SUMS


class Leaving(NamedTuple):
    """Of the key w - 1 tokens before each token, which has received all it ever will."""

    statistics: Tensor  # [B, T, Hk, 3]
    base: Tensor  # [B, T, Hk], its score but for the term
    sums: Tensor  # [B, T, Hk, 3]


class NewFacts(NamedTuple):
    """What the tokens of a call bring."""

    statistics: Tensor  # [B, T, Hk, 3], of each token's key
    base: Tensor  # [B, T, Hk], of the key LOOK_AHEAD before each token; 0 where there is none


def through_ring(
    new: NewFacts, seen: InWindow, form: WindowForm, order: TokenOrder, position: Tensor, ring: Tensor, wanted: bool
) -> tuple[Leaving, Tensor]:
    """What leaves the ring [N, W, Hk, 7] with each token, and the ring after the last one if it is ``wanted``.

    position [N]: tokens of earlier calls.
    """
    got = received_by(seen, form, order, position)
    leaving = _leaving(new, got, form, order, position, ring)
    return leaving, _after(new, got, form, order, position, ring) if wanted else ring


def _leaving(
    new: NewFacts, got: Received | FromStart, form: WindowForm, order: TokenOrder, position: Tensor, ring: Tensor
) -> Leaving:
    window, (rows, length) = form.window, new.base.shape[:2]
    rank = order.rank.expand(rows, -1)
    place = torch.arange(length, device=rank.device).expand(rows, -1)
    row = torch.arange(rows, device=rank.device)[:, None]
    held = order.numbers() * window + (order.positions(position) + 1) % window
    old = ring.flatten(0, 1)[held]  # [B, T, Hk, 7]
    earlier = wide(rank < window - 1, old)
    sums = got.collected(row, place - window + 1, place - rank, place, form.stride)
    return Leaving(
        torch.where(earlier, old[..., :STATISTICS], new.statistics.roll(window - 1, 1)),
        torch.where(
            wide(rank < window - 1 - LOOK_AHEAD, new.base),
            old[..., STATISTICS],
            new.base.roll(window - 1 - LOOK_AHEAD, 1),
        ),
        _joined(torch.where(earlier, old[..., -SUMS:], 0.0), sums.to(old.dtype)),
    )


def _after(
    new: NewFacts, got: Received | FromStart, form: WindowForm, order: TokenOrder, position: Tensor, ring: Tensor
) -> Tensor:
    """The ring with the keys of the last W tokens."""
    window, length = form.window, new.base.shape[1]
    row, last = (t[:, None] for t in order.last_places())  # [N, 1]
    counts = order.counts[:, None]
    newest = position[:, None] + counts - 1
    back = (newest - torch.arange(window, device=ring.device)) % window  # of each place's key from the newest
    sums = got.collected(row, last - back, last - counts + 1, last, form.stride)
    statistics = new.statistics[row, (last - back).clamp(0, length - 1)]
    base = new.base[row, (last - back + LOOK_AHEAD).clamp(0, length - 1)]
    earlier, known = wide(back >= counts, sums), wide(back >= LOOK_AHEAD, base)
    old_base = torch.where(wide(back - LOOK_AHEAD >= counts, base), ring[..., STATISTICS], base)
    parts = [
        torch.where(earlier, ring[..., :STATISTICS], statistics),
        torch.where(known, old_base, 0.0).unsqueeze(-1),
        _joined(torch.where(earlier, ring[..., -SUMS:], 0.0), sums.to(ring.dtype)),
    ]
    return torch.cat(parts, -1)


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """Sum, late sum and maximum [..., 3] of both."""
    return torch.cat([one[..., :2] + other[..., :2], torch.maximum(one[..., 2:], other[..., 2:])], -1)
