"""Key expiry as its definition reads: every pair of keys compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lizard_ops.common.places import each, most
from lizard_ops.common.sequences import one_sequence, put_rows, ring_after, sequence_slices, stack_states, with_ring
from lizard_ops.key_expiry.arguments import (
    NEVER,
    Expiries,
    ExpiryInputs,
    ExpiryOptions,
    ExpiryState,
    Left,
    expiry_arguments,
)


def naive_key_expiry(
    scores: Tensor,
    window: int,
    anchors: int,
    kept_keys: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    initial_state: ExpiryState | None = None,
    output_final_state: bool = False,
) -> Expiries:
    """The reference of ``key_expiry``, whose docstring says what every argument is. Quadratic in time and memory."""
    options = ExpiryOptions(window, anchors, kept_keys, output_final_state)
    expiry, left = naive_expiry(
        *expiry_arguments(ExpiryInputs(scores, initial_state, cu_seqlens, padding_mask), options)
    )
    return Expiries(expiry, None if left is None else left.state, None if left is None else left.carried)


def naive_expiry(inputs: ExpiryInputs, options: ExpiryOptions) -> tuple[Tensor, Left | None]:
    """(expiry [B, T, Hk], what is left of each sequence) of checked arguments."""
    slices = sequence_slices(inputs)
    parts = [expiry_of_one(one_sequence(inputs, n, row, at), options) for n, (row, at) in enumerate(slices)]
    blank = torch.full(inputs.scores.shape, NEVER, device=inputs.scores.device)
    return put_rows(blank, slices, [expiry for expiry, _ in parts]), stack_states([left for _, left in parts])


def expiry_of_one(inputs: ExpiryInputs, options: ExpiryOptions) -> tuple[Tensor, Left]:
    """One sequence, scores [T, Hk]: (expiry [T, Hk], what is left without the leading N).

    e_j = max(j, p_P) + window, p_P the P-th key better than j in the order of positions; NEVER without one.
    """
    scores, past, window = inputs.scores, inputs.initial_state, options.window
    length, heads = scores.shape
    begin = 0 if past is None else int(past.position)
    rows = with_ring(None if past is None else past.ring_scores, scores, begin)
    end = begin + length
    at = torch.arange(end - len(rows), end, device=scores.device).unsqueeze(1).expand_as(rows)
    held = len(rows) - length
    if past is not None:  # the kept keys are older than the ring
        held_at, order = past.kept_positions.sort(0)
        rows, at = torch.cat([past.kept_scores.gather(0, order), rows]), torch.cat([held_at, at])

    is_key = at >= max(options.anchors, 0)
    better = (rows.unsqueeze(1) > rows) | ((rows.unsqueeze(1) == rows) & (at.unsqueeze(1) < at))  # [J', J, Hk]
    count = (better & is_key.unsqueeze(1)).cumsum(0)
    places = each(options.kept_keys, heads)
    wanted = torch.tensor(places, device=scores.device)
    enough = torch.where(count >= wanted, at.unsqueeze(1), NEVER).amin(0) if len(rows) else at
    expiry = torch.where(is_key & (enough < NEVER), torch.maximum(enough, at) + window, NEVER)

    carried = None
    if past is not None:
        ring = torch.full((window, heads), NEVER, device=scores.device)
        ring[torch.arange(begin - held, begin) % window] = expiry[len(expiry) - length - held : len(expiry) - length]
        back = torch.zeros_like(order).scatter(
            0, order, torch.arange(len(order), device=order.device).unsqueeze(1).expand_as(order)
        )
        carried = torch.cat([expiry[: len(order)].gather(0, back), ring])
    left = Left(torch.tensor(end, device=scores.device), carried=carried)
    if options.output_final_state:
        gone = is_key & (at < end - window)
        kept_scores = rows.new_full((most(options.kept_keys), heads), -torch.inf)
        kept_positions = torch.full_like(kept_scores, -1, dtype=torch.int64)
        for h in range(heads):
            scored = sorted(
                (-score, j) for score, j in zip(*(x[gone[:, h], h].tolist() for x in (rows, at)), strict=True)
            )
            for place, (score, j) in enumerate(sorted(scored[: places[h]], key=lambda key: key[1])):
                kept_scores[place, h], kept_positions[place, h] = -score, j
        ring_scores = ring_after(rows[len(rows) - length - held :], window, end)
        left = left._replace(kept_scores=kept_scores, kept_positions=kept_positions, ring_scores=ring_scores)
    return expiry[len(expiry) - length :], left
