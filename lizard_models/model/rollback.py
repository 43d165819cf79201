"""Taking tokens back out of a constant-size state: the state from before them, and what the layer read of them."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_layers import AnchorBlock, AttentionConfig, HybridAttention, State, map_state, select_sequences

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
        self.blocks: list[
            tuple[int, AnchorBlock | None]
        ] = []  # lengths add up to the tokens held; None: no anchor moves

    def tokens(self) -> int:
        """Tokens that can be taken back."""
        return min(self._held(), self.limit)

    def _held(self) -> int:
        return 0 if self.read is None else self.read[0].shape[1]

    def record(
        self,
        attention: HybridAttention,
        inputs: tuple[Tensor | None, ...],
        anchor_blocks: list[AnchorBlock] | None = None,
    ) -> None:
        """Remember (x, q, k, v, cos, sin, padding mask) of at most ``limit`` tokens that are read next.

        anchor_blocks: theirs, kept where ``depends_on_blocks``. Where twice the limit are held, all before the last
        ``limit`` become the state to start from.
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
            self.blocks = _between(self.blocks, self._held() - kept, self._held())
            self.read = tuple(t[:, t.shape[1] - kept :] for t in self.read)
        self.read = new if self.read is None else tuple(torch.cat(pair, 1) for pair in zip(self.read, new, strict=True))
        needed = anchor_blocks is not None and depends_on_blocks(attention.config)
        self.blocks += [(b.length, b) for b in anchor_blocks or ()] if needed else [(x.shape[1], None)]

    def without(self, removed: int) -> State | None:
        """The state without the last ``removed`` tokens; None before the first."""
        return self._after(self._held() - removed)

    def _after(self, kept: int) -> State | None:
        """The state after the first ``kept`` tokens of those held."""
        if kept == 0:
            return snapshot(self.base)
        assert self.read is not None and self.attention is not None
        x, q, k, v, *rope, mask = (t[:, :kept] for t in self.read)
        blocks = _filled(_between(self.blocks, 0, kept))
        return self.attention(x, q, k, v, tuple(rope) if rope else None, self.base, True, mask, None, blocks)[1]

    def select(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self.base = None if self.base is None else select_sequences(self.base, indices)
        if self.read is not None:
            self.read = tuple(t.index_select(0, indices.to(t.device)) for t in self.read)
            self.blocks = [(n, None if b is None else _rows(b, indices)) for n, b in self.blocks]

    def copy(self) -> Rollback:
        """An independent one."""
        new = Rollback(self.base, self.limit)
        new.read, new.attention, new.blocks = self.read, self.attention, list(self.blocks)  # never written to
        return new


def depends_on_blocks(config: AttentionConfig) -> bool:
    """Whether states, and not outputs alone, depend on how far anchors and kept keys have moved on.

    So where scores read what keys receive beside the anchors, and where keys that would move on are dropped from the
    state for good.
    """
    return config.keeps_keys and (config.score_received or config.kept_past == "dropped")


def snapshot(state: State | None) -> State | None:
    """The state in memory of its own."""
    return None if state is None else map_state(state, torch.clone)


def _between(
    blocks: list[tuple[int, AnchorBlock | None]], start: int, stop: int
) -> list[tuple[int, AnchorBlock | None]]:
    """Those of the tokens from ``start`` to ``stop``."""
    found, end = [], 0
    for length, block in blocks:
        inside = min(end + length, stop) - max(end, start)
        end += length
        if inside > 0:
            found.append((inside, block))
    return found


def _filled(blocks: list[tuple[int, AnchorBlock | None]]) -> list[AnchorBlock] | None:
    """Blocks for all tokens, with anchors that stay where there was none; None if none move."""
    like = next((block for _, block in blocks if block is not None), None)
    if like is None:
        return None
    sin, moved, shift = (torch.zeros_like(t) for t in (like.sin, like.moved, like.shift))
    stays = like._replace(cos=torch.ones_like(like.cos), sin=sin, moved=moved, shift=shift)
    return [(stays if block is None else block)._replace(length=length) for length, block in blocks]


def _rows(block: AnchorBlock, indices: Tensor) -> AnchorBlock:
    """The block of the rows ``indices``; one of all rows as it is."""
    fields = (block.cos, block.sin, block.moved, block.shift)
    cos, sin, moved, shift = (t if t.shape[0] == 1 else t.index_select(0, indices.to(t.device)) for t in fields)
    return block._replace(cos=cos, sin=sin, moved=moved, shift=shift)
