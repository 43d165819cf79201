"""An attention layer that reads and writes the states of a batch in a pool of pages. Knows nothing of vLLM.

Shapes: N sequences, T tokens of all of them one after another, Hq query heads, Hk key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from lizard_layers import AnchorBlock, HybridAttention, PackedBlock, PagedState, State

Blocks = Sequence[AnchorBlock | PackedBlock]


class Moves(NamedTuple):
    """How far the anchors of a layer have moved on, asked where a position may be past the limit; None: nowhere."""

    decodes: Callable[[Tensor], Blocks | None] = lambda positions: None
    """Of positions [Nd, 1], one a sequence."""

    prefills: Callable[[list[int], list[int]], Blocks | None] = lambda starts, lengths: None
    """Of the first position of each sequence and its number of tokens."""


NOWHERE = Moves()


class Steps(NamedTuple):
    """What a batch asks of every layer: decodes of one token each first, then prefills, which may be pieces."""

    decode_slots: Tensor  # [Nd] int32 or int64, pages of the sequences that write, -1 for padding
    prefill_slots: Tensor  # [Np] the same of those that read
    prefill_starts: Tensor  # [Np + 1] int32 or int64 among the tokens of prefills, the last is their number
    has_state: Tensor  # [Np] bool, False for a sequence that begins
    prefill_lengths: list[int]
    prefill_begins: list[int]  # the position of each one's first token
    far: bool = False  # whether a position may be past the limit where anchors move


def read_batch(
    attention: HybridAttention,
    pool: State,
    heads: tuple[Tensor, Tensor, Tensor, Tensor],
    rope: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    steps: Steps,
    moves: Moves = NOWHERE,
) -> Tensor:
    """The outputs [T, Hq, D] of a layer for a batch, whose states go on in their pages of ``pool``.

    heads: x [T, hidden], q [T, Hq, D], k and v [T, Hk, D] as ``HybridAttention`` takes them. rope: cos, sin [T, D];
    None for a layer without positions. positions [T] int64. moves: asked where ``steps.far``. Tokens past those of the
    steps give 0.
    """
    q = heads[1]
    out = q.new_zeros(q.shape)
    decodes, total = len(steps.decode_slots), sum(steps.prefill_lengths)

    def part(where: slice, of_rows: bool) -> list[Tensor]:
        """The tokens there as rows of one token, or as one row: x, q, k, v, cos and sin."""
        return [t[where].unsqueeze(1 if of_rows else 0) for t in (*heads, *(rope or ()))]

    def read(where: slice, state: PagedState, starts: Tensor | None, moved: Blocks | None) -> Tensor:
        tokens = part(where, state.has_state is None)
        turns = (tokens[4], tokens[5]) if rope is not None else None
        return attention(*tokens[:4], turns, state, True, None, starts, moved)[0]

    if decodes:
        where = slice(0, decodes)
        moved = moves.decodes(positions[where, None]) if steps.far else None
        out[where] = read(where, PagedState(pool, steps.decode_slots), None, moved)[:, 0]
    if total:
        where = slice(decodes, decodes + total)
        state = PagedState(pool, steps.prefill_slots, steps.has_state)
        moved = moves.prefills(steps.prefill_begins, steps.prefill_lengths) if steps.far else None
        out[where] = read(where, state, steps.prefill_starts, moved)[0]
    return out
