"""The fuzz through ``torch.compile(backend="eager")``, when asked: tracing takes from seconds to a minute."""

from __future__ import annotations

from typing import Any

import torch
from drawn import SEEDS, piece
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from machine import CALLS, WHICH, close
from whole import Fuzz

MOST = 4  # traced calls a sequence


class Traced(Fuzz):
    """Forwards of a compiled model among the others, on the same caches."""

    def __init__(self) -> None:
        super().__init__()
        torch.compiler.reset()
        self.compiled: tuple[Any, Any] | None = None
        self.calls = 0

    def traced(self) -> Any:
        """The compiled form of the model that is in use now."""
        if self.compiled is None or self.compiled[0] is not self.model:
            self.compiled = self.model, torch.compile(self.model, backend="eager")
        self.calls += 1
        CALLS["compiled"] += 1
        return self.compiled[1]

    @precondition(lambda self: self.live and self.calls < MOST)
    @rule(which=WHICH, length=st.sampled_from([1, 1, 5, 12]), seed=SEEDS, pad=st.sampled_from(["none", "left"]))
    def read_traced(self, which: int, length: int, seed: int, pad: str) -> None:
        held = self.at(which)
        new = piece(len(held.rows), length, seed, pad)
        with_mask = new.padded() or held.padded()
        if self.refusal(held, new, with_mask) is None:  # a graph refuses nothing that is in the data
            self.forward(held, new, self.traced(), with_mask=with_mask)

    @precondition(lambda self: self.of is not None and self.calls < MOST)
    @rule(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=SEEDS)
    def packed_traced(self, lengths: list[int], seed: int) -> None:
        new, start = piece(1, sum(lengths), seed), 0
        places = torch.tensor([[t for n in lengths for t in range(n)]])
        with torch.no_grad():
            logits = self.traced()(new.ids(), position_ids=places, use_cache=False).logits
        for n in lengths:
            text = tuple(new.rows[0][start : start + n])
            close(logits[0, start : start + n], self.of.oracle.logits(text), self.of.tolerance, "packed and traced")
            start += n
