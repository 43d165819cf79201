"""How the tokens of a call follow each other, in rows with padding and in packed rows too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops import Compaction, compact, compaction, packed_cumsum, restore


class TokenOrder(NamedTuple):
    """How the tokens of a call follow each other: each row's real ones, or those of each packed sequence.

    Padded rows are read with their real tokens to the left, in order (``arrange``), and put back (``restore``). What
    stands behind them is read by nothing that is kept.
    """

    counts: Tensor  # [N] int64, new tokens of each sequence
    rank: Tensor  # [1, T] int64, how many tokens of its sequence and this call come before
    plan: Compaction | None = None  # of padded rows
    ends: Tensor | None = None  # [N + 1] int64
    sequence: Tensor | None = None  # [T] int64, the packed sequence of each token

    @staticmethod
    def of(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> TokenOrder:
        batch, length = x.shape[:2]
        places = torch.arange(length, device=x.device)
        if cu_seqlens is not None:
            ends = cu_seqlens.long()
            sequence = torch.searchsorted(ends[1:], places, right=True)
            return TokenOrder(ends.diff(), (places - ends[sequence])[None], ends=ends, sequence=sequence)
        if mask is None:
            return TokenOrder(torch.full((batch,), length, device=x.device), places[None])
        plan = compaction(mask)
        return TokenOrder(plan.lengths, places[None], plan)

    def arrange(self, z: Tensor) -> Tensor:
        return z if self.plan is None else compact(z, self.plan)

    def restore(self, z: Tensor) -> Tensor:
        """Undo ``arrange``, with zeros at padding."""
        return z if self.plan is None else restore(z, self.plan)

    def real(self) -> Tensor:
        """Which places of ``arrange``d rows hold a token, [1 or B, T] bool."""
        return self.rank < self.counts[:, None] if self.sequence is None else self.rank >= 0

    def numbers(self) -> Tensor:
        """The sequence of each token, int64 [B, 1] or [1, T]."""
        if self.sequence is not None:
            return self.sequence[None]
        return torch.arange(self.counts.shape[0], device=self.rank.device)[:, None]

    def last_places(self) -> tuple[Tensor, Tensor]:
        """Row and place of the last new token of each sequence, [N] each; of the one before for a sequence of none."""
        if self.ends is not None:
            return torch.zeros_like(self.counts), self.ends[1:] - 1
        return torch.arange(self.counts.shape[0], device=self.counts.device), self.counts - 1

    def positions(self, seen: Tensor) -> Tensor:
        """Of each token in its sequence [B, T], after ``seen`` [N] tokens of earlier calls."""
        return self.rank + (seen[:, None] if self.sequence is None else seen[self.sequence][None])

    def before(self, z: Tensor, first: Tensor) -> Tensor:
        """z [B, T, ...] one token later; ``first`` [N, ...] in the place of each sequence's first token."""
        start = first[:, None] if self.sequence is None else first[self.sequence][None]
        return torch.where(wide(self.rank == 0, z), start, z.roll(1, 1))  # a slice would ask whether T is 2

    def running_sum(self, z: Tensor, start: Tensor) -> Tensor:
        """Sums over each sequence up to each token, its own included, from ``start`` [N, ...] on."""
        if self.sequence is None:
            return sums_along_rows(z) + start[:, None]
        return packed_cumsum(z, self.rank) + start[self.sequence][None]

    def last(self, z: Tensor, otherwise: Tensor) -> Tensor:
        """z at the last new token of each sequence, [N, ...]; ``otherwise`` for a sequence that has none."""
        if self.ends is None and self.plan is None:
            return z[:, -1]
        if self.ends is None:
            rows = z[torch.arange(z.shape[0], device=z.device), (self.counts - 1).clamp(min=0)]
        else:
            rows = z[0, (self.ends[1:] - 1).clamp(min=0)]
        return torch.where((self.counts > 0).view(-1, *[1] * (rows.ndim - 1)), rows, otherwise)


def sums_along_rows(z: Tensor) -> Tensor:
    """z [B, T, ...] summed up to each token. With T innermost: along another axis a GPU has a thread for each of the
    other numbers, which goes through all tokens alone (2.4 ms for [2, 8192, 3, 64] in float64 on an H200)."""
    return z.movedim(1, -1).cumsum(-1).movedim(-1, 1)


def wide(t: Tensor, like: Tensor) -> Tensor:
    """t [B, T] with as many axes as ``like``."""
    return t.view(*t.shape, *[1] * (like.ndim - t.ndim))
