"""Padding out of the way and back, and sums of packed rows, without asking the device for a number."""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from lizard_ops.common.sizes import is_known

MOST = 2**31  # tokens of a row whose length an export leaves open


class Compaction(NamedTuple):
    """How the real tokens of each row move to its left, in order.

    Compacted rows are right-padded: slots from ``lengths`` on hold zeros. A causal op needs no mask for them, only
    its final state does.
    """

    mask: Tensor  # [B, T] bool, True at real tokens, in the caller's order
    source: Tensor  # [B, T] int64, where slot t of the compacted row comes from
    slot: Tensor  # [B, T] int64, where token t of the caller's row went; 0 at padding
    lengths: Tensor  # [B] int64, real tokens


def compaction(padding_mask: Tensor) -> Compaction:
    """Plan the move for a mask [B, T] that is True at real tokens."""
    source = torch.argsort(~padding_mask, dim=1, stable=True)
    slot = (padding_mask.cumsum(1) - 1).clamp(min=0)
    return Compaction(padding_mask, source, slot, padding_mask.sum(1))


@overload
def compact(x: Tensor, plan: Compaction) -> Tensor: ...
@overload
def compact(x: None, plan: Compaction) -> None: ...
def compact(x: Tensor | None, plan: Compaction) -> Tensor | None:
    """x [B, T, ...] with real tokens first and zeros after them, whatever stood at the padding (NaN too)."""
    if x is None:
        return None
    real = torch.arange(x.shape[1], device=x.device) < plan.lengths.unsqueeze(1)
    return _take(x, plan.source, real, 0.0)


def restore(x: Tensor, plan: Compaction, fill: float = 0.0) -> Tensor:
    """Undo ``compact``: x [B, T, ...] in the caller's order, ``fill`` at padding."""
    return _take(x, plan.slot, plan.mask, fill)


def _take(x: Tensor, index: Tensor, valid: Tensor, fill: float) -> Tensor:
    batch, length = index.shape
    flat = index + length * torch.arange(batch, device=x.device).unsqueeze(1)
    rows = x.flatten(0, 1).index_select(0, flat.flatten()).view_as(x)
    return rows.masked_fill(~valid.view(batch, length, *[1] * (x.ndim - 2)), fill)


def packed_cumsum(x: Tensor, rank: Tensor) -> Tensor:
    """Sums of x [B, T, ...] over each packed sequence up to each token, its own included.

    rank [B, T]: how many tokens of its sequence come before a token. After the step with ``ahead`` a row holds the sum
    of the last 2 ``ahead`` tokens of its sequence, so log T steps do. No sum holds a token of another sequence, as
    differences of one running sum would: neither NaN nor rounding passes from one to the next, nor do gradients.
    """
    ahead, longest = 1, x.shape[1] if is_known(x.shape[1]) else MOST
    while ahead < longest:
        there = (rank >= ahead).view(*rank.shape, *[1] * (x.ndim - 2))
        x = torch.where(there, x + x.roll(ahead, 1), x)
        ahead *= 2
    return x
