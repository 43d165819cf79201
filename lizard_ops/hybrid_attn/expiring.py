"""Scores become expiries, over the rows that the branches see: kept keys, ring, new tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import gather_rows, layout_of, ring_in_order
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, expiry_options, kept_places, scored_state
from lizard_ops.hybrid_attn.places import PLACED
from lizard_ops.key_expiry.arguments import NEVER, ExpiryInputs, ExpiryOptions, Left
from lizard_ops.key_expiry.chunk_torch import expiry_rows

ExpiryRows = Callable[[ExpiryInputs, Tensor | None, ExpiryOptions], tuple[Tensor, Left]]


def with_expiries(
    x: HybridInputs, lengths: Tensor | None, options: HybridOptions, expiries: ExpiryRows = expiry_rows
) -> tuple[HybridInputs, dict[str, Tensor | None]]:
    """Right-padded rows with expiries in place of their scores, and the fields of the final state that scores decide.

    The rows of ``expiry`` and ``kept_rows`` are described with ``WindowInputs``; the kept keys of the state come back
    in the order of their positions, which is that of their rows. expiries: the form of ``key_expiry`` to ask.
    """
    if x.scores is None:
        return x, {}
    delay, window, state, places = options.score_delay, options.window, x.initial_state, kept_places(x, options)
    batch, length, heads = x.scores.shape
    layout = layout_of(x.q, state, None, lengths)
    if state is not None:
        state = in_order_of_position(state)
    found, left = expiries(ExpiryInputs(x.scores, scored_state(state, options)), lengths, expiry_options(options))
    unscored = found.new_full((batch, delay, heads), NEVER)  # keys whose scores are yet to come are in the window
    if left.carried is None:
        ends, prefix = torch.cat([found, unscored], 1)[:, delay:], 0
    else:
        ring, prefix = ring_in_order(left.carried[:, places:], layout.position), window
        ends = torch.cat([ring, found, unscored], 1)  # of all positions from that of the oldest in the ring on
    first = layout.position.view(-1, 1, 1)
    row = torch.arange(prefix + length, device=found.device).view(1, -1, 1) - prefix
    is_key = (first + row >= options.anchors) & (row < layout.length.view(-1, 1, 1))
    ends = torch.where(is_key, ends - first, -1)
    if state is not None and state.kept_positions is not None and left.carried is not None:
        kept = torch.where(state.kept_positions < 0, -1, left.carried[:, :places] - first)
        ends = torch.cat([kept, ends], 1)
    x = x._replace(expiry=ends, scores=None, initial_state=state)
    if not options.output_final_state:
        return x, {}

    assert left.kept_positions is not None and left.kept_numbers is not None
    empty = left.kept_positions < 0
    offset = 0 if state is not None else places + delay  # scores are numbered from the places on, later than keys
    x = x._replace(kept_rows=(left.kept_numbers - offset).masked_fill(empty, -1))
    positions = (left.kept_positions - delay).masked_fill(empty, -1)
    scored = {"kept_scores": left.kept_scores, "kept_positions": positions, "ring_scores": left.ring_scores}
    return x, scored


def in_order_of_position(state: AttentionState) -> AttentionState:
    """The state with its kept keys in the order of their positions, empty places last."""
    assert state.kept_positions is not None
    order = torch.where(state.kept_positions < 0, NEVER, state.kept_positions).sort(dim=1, stable=True)[1]
    fields = {name: getattr(state, name) for name in PLACED}
    return state._replace(**{name: gather_rows(f, order) for name, f in fields.items() if f is not None})
