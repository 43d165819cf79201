"""Taking tokens back out of a constant-size state: the state from before them, and what the layer read of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_layers import HybridAttention, State, map_state, select_sequences

LIMIT = 128  # tokens a layer can take back unless more are drafted; more cost memory without a reader


class Rollback:
    """The state before the last tokens, and those tokens as the layer read them.

    A state cannot forget a token, but the layer can read the kept ones again: one attention call a layer on at most
    2 ``limit`` tokens, without projections or MLPs. The last ``limit`` of those recorded can be taken back. The
    layer is kept as long as its tokens are: the model may be gone, and the cache go on in another of its weights.
    """

    def __init__(self, state: State | None, limit: int = LIMIT) -> None:
        self.limit = limit
        self.base = snapshot(state)
        self.read: tuple[Tensor, ...] | None = None
        self.attention: HybridAttention | None = None

    def tokens(self) -> int:
        """Tokens that can be taken back."""
        return min(self._held(), self.limit)

    def _held(self) -> int:
        return 0 if self.read is None else self.read[0].shape[1]

    def record(self, attention: HybridAttention, inputs: tuple[Tensor | None, ...]) -> None:
        """Remember (x, q, k, v, cos, sin, padding mask) of at most ``limit`` tokens that are read next.

        Where twice the limit are held, all before the last ``limit`` become the state to start from.
        """
        x, mask = inputs[0], inputs[-1]
        assert x is not None
        if mask is None:
            mask = x.new_ones(x.shape[:2], dtype=torch.bool)
        new = tuple(t.expand(x.shape[0], *t.shape[1:]) for t in (*inputs[:-1], mask) if t is not None)
        self.attention = attention
        if self._held() + x.shape[1] > 2 * self.limit and self.read is not None:
            kept = max(0, self.limit - x.shape[1])
            self.base = snapshot(self._after(self._held() - kept))
            self.read = tuple(t[:, t.shape[1] - kept :] for t in self.read)
        self.read = new if self.read is None else tuple(torch.cat(pair, 1) for pair in zip(self.read, new, strict=True))

    def without(self, removed: int) -> State | None:
        """The state without the last ``removed`` tokens; None before the first."""
        return self._after(self._held() - removed)

    def _after(self, kept: int) -> State | None:
        """The state after the first ``kept`` tokens of those held."""
        if kept == 0:
            return snapshot(self.base)
        assert self.read is not None and self.attention is not None
        x, q, k, v, *rope, mask = (t[:, :kept] for t in self.read)
        return self.attention(x, q, k, v, tuple(rope) if rope else None, self.base, True, mask)[1]

    def select(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.base = None if self.base is None else select_sequences(self.base, indices)
        if self.read is not None:
            self.read = tuple(t.index_select(0, indices.to(t.device)) for t in self.read)

    def copy(self) -> Rollback:
        """An independent one."""
        new = Rollback(self.base, self.limit)
        new.read, new.attention = self.read, self.attention  # never written to
        return new


def snapshot(state: State | None) -> State | None:
    """The state in memory of its own."""
    return None if state is None else map_state(state, torch.clone)
