"""One sequence at a time, in plain Python integers: what the naive references stand on."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.checks import is_shape, want, want_values
from lizard_ops.common.rows import Inputs, changed_rows
from lizard_ops.common.state import State, map_fields


def sequence_slices(inputs: Inputs) -> list[tuple[int, Tensor]]:
    """One (row, positions) pair per sequence.

    cu_seqlens [N+1] packs N sequences into the one row; padding_mask [B, T] is True at real tokens.
    """
    want(
        not is_shape(inputs.q), inputs._fields[0], inputs.q, "a tensor with values (not meta or fake) for the naive op"
    )
    for name in ("cu_seqlens", "padding_mask"):
        x = getattr(inputs, name)
        if x is not None:
            want_values(name, x, "the naive op")
    (batch, length), device = inputs.q.shape[:2], inputs.q.device
    if inputs.cu_seqlens is not None:
        ends = inputs.cu_seqlens.tolist()
        return [(0, torch.arange(a, b, device=device)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    if inputs.padding_mask is not None:
        return [(b, inputs.padding_mask[b].nonzero().squeeze(-1)) for b in range(batch)]
    return [(b, torch.arange(length, device=device)) for b in range(batch)]


def one_sequence(inputs: Inputs, n: int, row: int, at: Tensor) -> Inputs:
    """The inputs of sequence n, which stands at these positions of a row: [T, ...], its state without the leading N."""
    state = inputs.initial_state
    state = None if state is None else map_fields(lambda field: field[n], state)
    return changed_rows(inputs, lambda x: x[row, at], initial_state=state, cu_seqlens=None, padding_mask=None)


def with_ring(ring: Tensor | None, rows: Tensor, position: int) -> Tensor:
    """Put what the ring [W, ...] holds, oldest first, before the new rows [T, ...]; slot t % W holds position t."""
    if ring is None or ring.shape[0] == 0:
        return rows
    held = torch.arange(max(0, position - ring.shape[0]), position, device=ring.device) % ring.shape[0]
    return torch.cat([ring[held].to(rows.dtype), rows])


def expiring_rows(kept: Tensor | None, rows: Tensor) -> Tensor:
    """Kept keys [P, ...], in whatever order, before the ring's and the new rows [J, ...]."""
    return rows if kept is None else torch.cat([kept.to(rows.dtype), rows])


def positions_of(kept_positions: Tensor | None, first: int, end: int, like: Tensor) -> Tensor:
    """[P + J, Hk]: where the keys of these rows stand, -1 in empty places; like: [J, Hk, ...]."""
    at = torch.arange(first, end, device=like.device).unsqueeze(1).expand(-1, like.shape[1])
    return expiring_rows(kept_positions, at)


def rows_by_head(x: Tensor, rows: Tensor) -> Tensor:
    """[P, H, ...]: the rows of x [J, H, ...] that rows [P, Hk] names by key head, zero where it is -1."""
    rows = rows.repeat_interleave(x.shape[1] // rows.shape[1], 1)
    taken = torch.cat([x, torch.zeros_like(x[:1]) if len(x) else x.new_zeros(1, *x.shape[1:])])
    return taken[rows, torch.arange(x.shape[1], device=x.device)]


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


def stack_states(states: list[State]) -> State:
    """Put one-sequence states (fields without the leading N) together."""
    return map_fields(lambda *fields: torch.stack(fields), *states)


def put_rows(blank: Tensor, slices: list[tuple[int, Tensor]], rows: list[Tensor]) -> Tensor:
    """blank [B, T, ...] with the rows [t, ...] of each sequence in their places."""
    for (row, at), values in zip(slices, rows, strict=True):
        blank = blank.index_put((torch.full_like(at, row), at), values)
    return blank
