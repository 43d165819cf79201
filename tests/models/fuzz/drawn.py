"""What the rules draw: pieces of text with their padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from subjects import text
from torch import Tensor

PADS = ("none", "none", "left", "right", "gaps", "empty")
SEEDS = st.integers(0, 999)
LENGTHS = st.one_of(st.just(1), st.integers(2, 12), st.integers(1, 30))


@dataclass(frozen=True)
class Piece:
    """New columns of a batch: tokens, and which of them are real."""

    rows: list[list[int]]
    real: list[list[bool]]

    @property
    def length(self) -> int:
        return len(self.rows[0])

    def ids(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.long).view(len(self.rows), self.length)

    def mask(self) -> Tensor:
        return torch.tensor(self.real, dtype=torch.long).view(len(self.rows), self.length)

    def padded(self) -> bool:
        return not all(map(all, self.real))


def piece(rows: int, length: int, seed: int, pad: str = "none", letters: int = 95) -> Piece:
    """pad: where every row has padding, each another number of columns; the first row often none."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, length + 1, (rows,), generator=draw).tolist()
    gaps = (torch.rand(rows, length, generator=draw) < 0.6).tolist()
    at = range(length)
    real = {
        "none": lambda b: [True] * length,
        "left": lambda b: [t >= counts[b] for t in at],
        "right": lambda b: [t < counts[b] for t in at],
        "gaps": lambda b: gaps[b],
        "empty": lambda b: [b > 0] * length,
    }[pad]
    return Piece([text(length, 31 * seed + b, letters) for b in range(rows)], [real(b) for b in range(rows)])


def runs(real: list[bool]) -> int:
    """Runs of real tokens in a row: more than one is a gap."""
    return sum(now and not before for before, now in zip([False, *real], real, strict=False))
