"""States in a pool of pages, and an attention layer that reads and writes them there. Knows nothing of vLLM.

Shapes: N sequences, T tokens of all of them one after another, Hq query heads, Hk key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_layers import AnchorBlock, AttentionConfig, HybridAttention, State, empty_state, state_of, tensors_of

ALIGNMENT = 16  # bytes at whose multiples fields begin
NOBODY = 0  # the page of rows of padding: anything may be in it

Blocks = Callable[[Tensor, bool], "list[AnchorBlock] | None"]
"""positions [B, T] and whether each row is one block -> how far the anchors have moved on; None: nowhere."""


class Field(NamedTuple):
    """A tensor of a state inside a page."""

    start: int  # byte
    shape: tuple[int, ...]  # of one sequence
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class PageLayout:
    """Where the tensors of a layer's state lie in one page of bytes: one after another, each at a multiple of 16.

    config: the layer's. dtype: of keys and values. ``nbytes`` is what a page must have at least.
    """

    def __init__(self, config: AttentionConfig, dtype: torch.dtype) -> None:
        self.blank = tensors_of(empty_state(config, 1, dtype, "cpu"))  # of one sequence before its first token
        self.fields: dict[str, Field] = {}
        self.nbytes = 0
        for name, t in self.blank.items():
            self.fields[name] = Field(self.nbytes, tuple(t.shape[1:]), t.dtype)
            self.nbytes += -(-self.fields[name].nbytes // ALIGNMENT) * ALIGNMENT

    def views(self, pages: Tensor) -> dict[str, Tensor]:
        """pages [P, bytes] uint8 -> each field [P, ...] where it lies, strided.

        Raises ValueError for pages that are too small, or begin at odd bytes.
        """
        if pages.dtype != torch.uint8 or pages.ndim != 2 or pages.shape[1] < self.nbytes or pages.stride(1) != 1:
            raise ValueError(
                f"pages: got {pages.dtype} {tuple(pages.shape)} with strides {pages.stride()}, wanted uint8 "
                f"[P, {self.nbytes} or more] whose bytes lie together"
            )
        if pages.stride(0) % ALIGNMENT or pages.data_ptr() % ALIGNMENT:
            raise ValueError(f"pages: begin every {pages.stride(0)} bytes, wanted a multiple of {ALIGNMENT}")
        return {
            name: pages[:, f.start : f.start + f.nbytes].view(f.dtype).view(pages.shape[0], *f.shape)
            for name, f in self.fields.items()
        }

    def take(self, views: dict[str, Tensor], slots: Tensor, has_state: Tensor | None = None) -> State:
        """The states of the sequences in the pages ``slots`` [N], contiguous.

        has_state [N] bool: False where a page holds another text's state and the sequence begins; None: all have one
        but those of the page NOBODY, whose numbers may be anything, and whose positions, which say where kernels write,
        are made those of an empty state.
        """
        if self.blank["position"].device != slots.device:
            self.blank = {name: t.to(slots.device) for name, t in self.blank.items()}
        known = slots != NOBODY if has_state is None else has_state
        found = {}
        for name, t in views.items():
            found[name] = t.index_select(0, slots)
            if has_state is not None or not t.is_floating_point():
                found[name] = torch.where(known.view(-1, *(1,) * (t.ndim - 1)), found[name], self.blank[name])
        return state_of(found)

    @staticmethod
    def put(views: dict[str, Tensor], slots: Tensor, state: State) -> None:
        """Write the states back into the pages ``slots`` [N]. Of rows with the same page any one stays."""
        for name, t in tensors_of(state).items():
            views[name].index_copy_(0, slots, t)


class Steps(NamedTuple):
    """What a batch asks of every layer: decodes of one token each first, then prefills, which may be pieces."""

    decode_slots: Tensor  # [Nd] int64, pages of the sequences that write, NOBODY for padding
    prefill_slots: Tensor  # [Np] int64
    prefill_starts: Tensor  # [Np + 1] int32 or int64 among the tokens of prefills, the last is their number
    has_state: Tensor  # [Np] bool, False for a sequence that begins
    prefill_lengths: list[int]
    far: bool = False  # whether a position may be past the limit where anchors move


def read_batch(
    attention: HybridAttention,
    layout: PageLayout,
    views: dict[str, Tensor],
    heads: tuple[Tensor, Tensor, Tensor, Tensor],
    rope: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    steps: Steps,
    blocks: Blocks = lambda positions, whole: None,
) -> Tensor:
    """The outputs [T, Hq, D] of a layer for a batch, whose states go on in their pages.

    heads: x [T, hidden], q [T, Hq, D], k and v [T, Hk, D] as ``HybridAttention`` takes them. rope: cos, sin [T, D];
    None for a layer without positions. positions [T] int64. blocks: asked where ``steps.far``; prefills are then read
    one by one, since anchors of packed rows cannot move. Tokens past those of the steps give 0.
    """
    x, q = heads[:2]
    out = q.new_zeros(q.shape)
    decodes = len(steps.decode_slots)

    def part(where: slice, of_rows: bool) -> tuple[list[Tensor], tuple[Tensor, Tensor] | None]:
        """The tokens there as rows of one token, or as one row."""
        shaped = [t[where].unsqueeze(1 if of_rows else 0) for t in (*heads, *(rope or ()))]
        return shaped[:4], (shaped[4], shaped[5]) if rope is not None else None

    if decodes:
        where = slice(0, decodes)
        tokens, turns = part(where, True)
        moved = blocks(positions[where, None], True) if steps.far else None
        state = layout.take(views, steps.decode_slots)
        o, state = attention(*tokens, turns, state, True, None, None, moved, True)
        out[where] = o[:, 0]
        layout.put(views, steps.decode_slots, state)
    total = sum(steps.prefill_lengths)
    if total == 1 or (total and steps.far):
        start = decodes
        for i, length in enumerate(steps.prefill_lengths):
            where, row = slice(start, start + length), slice(i, i + 1)
            start += length
            if not length:
                continue
            tokens, turns = part(where, False)
            moved = blocks(positions[None, where], False) if steps.far else None
            state = layout.take(views, steps.prefill_slots[row], steps.has_state[row])
            o, state = attention(*tokens, turns, state, True, None, None, moved)
            out[where] = o[0]
            layout.put(views, steps.prefill_slots[row], state)
    elif total:
        where = slice(decodes, decodes + total)
        tokens, turns = part(where, False)
        state = layout.take(views, steps.prefill_slots, steps.has_state)
        o, state = attention(*tokens, turns, state, True, None, steps.prefill_starts)
        out[where] = o[0]
        layout.put(views, steps.prefill_slots, state)
    return out
