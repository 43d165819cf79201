"""One sequence at a time, in plain Python integers: what the naive references stand on."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.state import AttentionState


def sequence_slices(
    batch: int, length: int, cu_seqlens: Tensor | None, padding_mask: Tensor | None, device: torch.device
) -> list[tuple[int, Tensor]]:
    """One (row, positions) pair a sequence.

    cu_seqlens [N+1] packs N sequences into the one row; padding_mask [B, T] is True at real tokens.
    """
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [(0, torch.arange(a, b, device=device)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    if padding_mask is not None:
        return [(b, padding_mask[b].nonzero().squeeze(-1)) for b in range(batch)]
    return [(b, torch.arange(length, device=device)) for b in range(batch)]


def with_ring(ring: Tensor | None, rows: Tensor, position: int) -> Tensor:
    """Put what the ring [W, ...] holds, oldest first, before the new rows [T, ...]; slot t % W holds position t."""
    if ring is None or ring.shape[0] == 0:
        return rows
    held = torch.arange(max(0, position - ring.shape[0]), position, device=ring.device) % ring.shape[0]
    return torch.cat([ring[held].to(rows.dtype), rows])


def ring_after(rows: Tensor, window: int, position: int) -> Tensor:
    """The ring [W, ...] once ``position`` tokens were seen, the last of them being the last of rows [T, ...]."""
    newest = position - 1 - torch.arange(window, device=rows.device)  # newest positions, newest first
    held = newest[newest >= 0]
    ring = rows.new_zeros(window, *rows.shape[1:])
    return ring.index_put((held % window,), rows[held - position]) if held.numel() else ring


def anchors_after(kept: Tensor | None, rows: Tensor, anchors: int, position: int) -> Tensor:
    """The first rows of the sequence [A, ...]: those kept in the state, then those of the new rows, then zeros.

    position: tokens seen before the new rows.
    """
    blank = rows.new_zeros(anchors, *rows.shape[1:])
    if kept is None:
        return torch.cat([rows, blank])[:anchors]
    return torch.cat([kept[:position].to(rows.dtype), rows, blank])[:anchors]


def stack_states(states: list[AttentionState]) -> AttentionState:
    """Put one-sequence states (fields without the leading N) together."""
    fields = zip(*states, strict=True)
    return AttentionState._make(None if field[0] is None else torch.stack(field) for field in fields)


def state_of(state: AttentionState | None, n: int) -> AttentionState | None:
    """The state of sequence n, its fields without the leading N."""
    return None if state is None else AttentionState._make(None if field is None else field[n] for field in state)


def put_rows(blank: Tensor, slices: list[tuple[int, Tensor]], rows: list[Tensor]) -> Tensor:
    """blank [B, T, ...] with the rows [t, ...] of each sequence in their places."""
    for (row, at), values in zip(slices, rows, strict=True):
        blank = blank.index_put((torch.full_like(at, row), at), values)
    return blank
