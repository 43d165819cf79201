"""A rank's part of the sequence, and where rows of the others' parts are found in what they sent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.places import Places
from lizard_ops.common.streams import spread_to

Sent = dict[
    str, Tensor
]  # what every rank sends, of the same shapes on all; gathered [R, ...] in the order of the ranks


class Part(NamedTuple):
    """The rows of a rank, right-padded: real tokens first, zeros after them."""

    v: Tensor  # [B, T, Hk, V]
    k: Tensor | None = None  # [B, T, Hk, D] of a window branch
    fk: Tensor | None = None  # [B, T, Hk, Fp] of a linear branch, pre-activations
    g: Tensor | None = None  # [B, T, Hg] or [B, T, Hk, F]
    scores: Tensor | None = None  # [B, T, Hk] float32, of keys that may be kept
    padded: Tensor | None = None  # [B] int64, real tokens; None: all

    @property
    def lengths(self) -> Tensor:
        """[B] int64, real tokens."""
        if self.padded is None:
            return self.v.new_full(self.v.shape[:1], self.v.shape[1], dtype=torch.int64)
        return self.padded

    def rows(self) -> dict[str, Tensor]:
        """The tensors with a row per token."""
        fields = self._asdict()
        return {name: fields[name] for name in ("v", "k", "fk", "g", "scores") if fields[name] is not None}


class PartOptions(NamedTuple):
    """The choices of a call that decide what its state holds."""

    window: int = 0  # of the window branch, 0 without
    offset: int = 0  # newest keys that the linear branch leaves out
    anchors: int = 0
    feature_map: str = "identity"
    places: Places = 0  # of kept keys
    score_delay: int = 0
    late: bool = False  # kept keys enter the sums when they expire, not when they leave the window

    @property
    def newest(self) -> bool:
        """Whether the sums are decayed up to the newest token, rather than to the newest key that they hold."""
        return self.places != 0 and self.offset > 0

    @property
    def logs(self) -> bool:
        """Whether the sums have a log scale."""
        return self.feature_map == "exp" or self.newest

    def held(self) -> dict[str, int]:
        """How many of the newest rows of each tensor a state holds."""
        ring = max(self.window, self.offset)
        waiting = self.window - self.score_delay if self.places else 0
        return {"v": ring, "k": self.window, "fk": self.offset, "g": self.offset, "scores": waiting}


def edges_of(part: Part, options: PartOptions) -> Sent:
    """What others may need of a part: its length, its last rows and (``first_*``) those that may be anchors."""
    sent: Sent = {"lengths": part.lengths}
    for name, x in part.rows().items():
        count = options.held()[name]
        back = torch.arange(count, device=x.device) - count
        sent[name] = take(x, part.lengths.unsqueeze(1) + back)
    if options.window and options.anchors:
        first = torch.arange(options.anchors, device=part.v.device).expand(len(part.lengths), -1)
        assert part.k is not None
        beyond = part.lengths.unsqueeze(1)
        for name, x in (("first_k", part.k), ("first_v", part.v)):
            sent[name] = take(x, torch.where(first < beyond, first, -1))
    return sent


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows index [B, M] of x [B, T, ...], zero where that is negative."""
    if x.shape[1] == 0:
        return x.new_zeros(*index.shape, *x.shape[2:])
    row = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    taken = x.flatten(0, 1).index_select(0, (row + index.clamp(min=0)).flatten()).unflatten(0, index.shape)
    return taken.masked_fill(spread_to(index < 0, taken), 0)


class Before(NamedTuple):
    """Where the parts of all ranks lie, seen from one of them."""

    starts: Tensor  # [R + 1, B] int64, the first position of each part
    rank: int

    @classmethod
    def of(cls, lengths: Tensor, rank: int) -> Before:
        """lengths [R, B]."""
        return cls(torch.cat([torch.zeros_like(lengths[:1]), lengths.cumsum(0)]), rank)

    @property
    def position(self) -> Tensor:
        """[B] tokens before this part."""
        return self.starts[self.rank]

    @property
    def earlier(self) -> Tensor:
        """[R] which ranks come before this one."""
        return torch.arange(len(self.starts) - 1, device=self.starts.device) < self.rank

    def of_earlier(self, gathered: Tensor) -> Tensor:
        """gathered [R, ...] with zeros for this rank and later ones, which may hold NaN."""
        return torch.where(self.earlier.view(-1, *[1] * (gathered.ndim - 1)), gathered, 0)

    def find(self, edges: Tensor, at: Tensor, newest: bool) -> Tensor:
        """[B, M, ...]: rows of positions at [B, M] before this part, zero for others.

        edges [R, B, n, ...]: the last n rows of every part (``newest``), or the first n.
        """
        ranks, batch, count = edges.shape[:3]
        owner = (at >= self.starts[1:].unsqueeze(-1)).sum(0).clamp(max=ranks - 1)  # [B, M]
        local = at - self.starts.t().gather(1, owner + 1) + count if newest else at - self.starts.t().gather(1, owner)
        row = torch.arange(batch, device=at.device).unsqueeze(1)
        index = (owner * batch + row) * count + local
        there = (at >= 0) & (at < self.position.unsqueeze(1)) & (local >= 0) & (local < count)
        flat = edges.flatten(0, 2)
        if not flat.shape[0]:
            return edges.new_zeros(*at.shape, *edges.shape[3:])
        taken = flat.index_select(0, index.where(there, 0).flatten()).unflatten(0, at.shape)
        return taken.masked_fill(~spread_to(there, taken), 0)

    def ring(self, edges: Tensor) -> Tensor:
        """[B, W, ...] of the last W rows before this part: slot t % W holds position t; edges [R, B, W, ...]."""
        window = edges.shape[2]
        end = self.position.unsqueeze(1)
        slot = torch.arange(window, device=edges.device)
        return self.find(edges, end - 1 - (end - 1 - slot) % max(window, 1), newest=True)

    def first(self, edges: Tensor) -> Tensor:
        """[B, A, ...] of the first A rows of the sequence, zero from this part on; edges [R, B, A, ...]."""
        batch, count = edges.shape[1:3]
        return self.find(edges, torch.arange(count, device=edges.device).expand(batch, -1), newest=False)
