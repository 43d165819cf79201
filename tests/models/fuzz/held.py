"""A live cache and what the fuzz knows of it: every row's tokens, which of them are padding, what can be taken back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lizard_layers import tensors_of
from lizard_models import LizardCache


@dataclass
class Held:
    """rows, real: tokens and mask of all columns read. recorded: columns that can be taken back, None without."""

    cache: LizardCache
    rows: list[list[int]]
    real: list[list[bool]]
    recorded: int | None = None
    recall: int = 128
    static: bool = False  # and with kept softmax layers
    capacity: int | None = None  # positions for which there is room, None without a limit
    places: bool = True  # whether the cache knows where its padding is
    bytes: int | None = field(default=None, repr=False)

    @property
    def columns(self) -> int:
        return len(self.rows[0])

    def text(self, row: int) -> tuple[int, ...]:
        """The real tokens of a row."""
        return tuple(t for t, real in zip(self.rows[row], self.real[row], strict=True) if real)

    def counts(self) -> list[int]:
        """Real tokens of every row."""
        return [sum(row) for row in self.real]

    def padded(self) -> bool:
        return not all(map(all, self.real))

    def ids(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.long)

    def mask(self) -> Tensor:
        return torch.tensor(self.real, dtype=torch.long).view(len(self.rows), self.columns)

    def read(self, rows: list[list[int]], real: list[list[bool]]) -> None:
        self.rows = [old + new for old, new in zip(self.rows, rows, strict=True)]
        self.real = [old + new for old, new in zip(self.real, real, strict=True)]
        if self.recorded is not None:
            self.recorded = min(self.recorded + len(rows[0]), self.recall)

    def select(self, order: list[int]) -> None:
        self.rows, self.real = ([list(kept[i]) for i in order] for kept in (self.rows, self.real))
        self.bytes = None

    def crop(self, count: int) -> None:
        if count:
            self.rows, self.real = ([row[:-count] for row in kept] for kept in (self.rows, self.real))
        if self.recorded is not None:
            self.recorded = 0

    def twin(self, cache: LizardCache) -> Held:
        """The same knowledge of a copy."""
        new = copy.deepcopy(Held(None, self.rows, self.real, self.recorded, self.recall, self.static, self.capacity))  # type: ignore[arg-type]
        new.cache, new.places = cache, self.places
        return new

    def check(self) -> None:
        """What a cache says of itself."""
        cache, seen = self.cache, self.columns
        assert cache.get_seq_length() == seen, (cache.get_seq_length(), seen)
        assert cache.known_length() in (None, seen)
        for layer in cache.layers:
            assert int(layer.get_seq_length()) == seen, type(layer)
        positions = cache.positions()
        if seen:
            assert positions is not None and positions.tolist() == self.counts(), (positions, self.counts())
            past = cache.mask_of_the_past()
            assert past is not None and past.sum(1).tolist() == self.counts() and past.shape[1] == seen
        if len(cache.lizard_layers()) == len(cache.layers) and seen:
            size = cache.state_bytes()
            assert self.bytes in (None, size)
            self.bytes = size


def fingerprint(cache: Any) -> list[Any]:
    """All that a refused call must leave as it was."""
    found: list[Any] = [cache.get_seq_length(), cache.padded, cache.read_mask]
    for layer in cache.layers:
        if hasattr(layer, "state"):
            back = layer._rollback
            held = [] if layer.state is None else tensors_of(layer.state).values()
            found += [*held, layer._blank, layer.recall, None if back is None else back.tokens()]
        else:
            found += [layer.keys, layer.values, getattr(layer, "cumulative_length", None)]
    return [t.clone() if isinstance(t, Tensor) else t for t in found]


def unchanged(before: list[Any], after: list[Any]) -> bool:
    """Whether two fingerprints are the same, bit for bit."""
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b
        for a, b in zip(before, after, strict=True)
    )
