"""Anchors that move on in packed sequences: the first block of all of them side by side, then the second, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_layers.anchor_block import AnchorBlock
from lizard_layers.state import State, map_state, state_of, tensors_of


class PackedBlock(NamedTuple):
    """The n-th block of each of the packed sequences that have so many; the first names all, some with no tokens."""

    block: AnchorBlock  # of these tokens; its tensors have a row a sequence
    tokens: Tensor  # [M] int64, rising, their places in the packed row
    sequences: Tensor  # [n] int64, whose they are
    cu_seqlens: Tensor  # [n + 1] int32, where each sequence's begin among them

    @property
    def length(self) -> int:
        """Tokens of the block."""
        return self.block.length


def by_kind(
    blocks: Sequence[AnchorBlock | PackedBlock], cu_seqlens: Tensor | None, length: int
) -> tuple[list[AnchorBlock], list[PackedBlock]]:
    """The blocks of rows and those of packed sequences, of which one is empty.

    Raises ValueError where they are not those of ``length`` new positions, packed as ``cu_seqlens`` says.
    """
    plain = [block for block in blocks if isinstance(block, AnchorBlock)]
    packed = [block for block in blocks if isinstance(block, PackedBlock)]
    lengths = [block.length for block in blocks]
    if (plain if cu_seqlens is not None else packed) or sum(lengths) != length:
        raise ValueError(
            f"anchor_blocks have lengths {lengths}, wanted lengths that add up to the {length} new positions, and "
            "PackedBlocks with cu_seqlens, AnchorBlocks without"
        )
    return plain, packed


Read = Callable[[PackedBlock, "State | None", bool], "tuple[Tensor, State | None]"]
"""A block, the states of its sequences, whether states are wanted -> its outputs [1, M, ...] and their states then."""


def read_packed(
    read: Read, blocks: Sequence[PackedBlock], state: State | None, use_state: bool
) -> tuple[Tensor, State | None]:
    """The outputs [1, T, ...] of all blocks in the order of the packed row, and the states after them if ``use_state``.

    state: of all sequences.
    """
    outputs, states = [], state
    for n, block in enumerate(blocks):
        held = states if n == 0 or states is None else _rows(states, block.sequences)
        o, new = read(block, held, use_state or n + 1 < len(blocks))
        outputs.append(o)
        states = new if n == 0 or states is None or new is None else _with_rows(states, block.sequences, new)
    states = states if use_state else None
    if len(outputs) == 1:
        return outputs[0], states
    whole = torch.cat(outputs, 1)
    return torch.empty_like(whole).index_copy(1, torch.cat([block.tokens for block in blocks]), whole), states


def _rows(states: State, sequences: Tensor) -> State:
    return map_state(states, lambda t: t.index_select(0, sequences))


def _with_rows(states: State, sequences: Tensor, new: State) -> State:
    """The states with those of ``sequences`` exchanged."""
    made = tensors_of(new)
    return state_of(
        {name: t.index_copy(0, sequences, made[name].to(t.dtype)) for name, t in tensors_of(states).items()}
    )
