"""One position after another: what the recurrent ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lizard_ops.common.checks import STATE_DTYPES, work_dtype
from lizard_ops.common.rows import Inputs, changed_rows
from lizard_ops.common.sizes import is_known
from lizard_ops.common.state import EMPTY_VALUES, AttentionState, map_fields

Step = Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]


def put_at(kept: Tensor, index: Tensor, new: Tensor, inplace: bool = False) -> Tensor:
    """kept [N, M, ...] with new [N, ...] at place ``index`` [N] of each row; out of place in the dtype of new."""
    if inplace and is_one(kept.shape[0]):
        return kept.index_copy_(1, index, new.to(kept.dtype).unsqueeze(1))
    rows = torch.arange(kept.shape[0], device=kept.device)
    if inplace:
        return kept.index_put_((rows, index), new.to(kept.dtype))
    return kept.to(new.dtype).index_put((rows, index), new)


def take_at(kept: Tensor, index: Tensor) -> Tensor:
    """[N, ...]: place ``index`` [N] of each row of kept [N, M, ...]."""
    if is_one(kept.shape[0]):
        return kept.index_select(1, index).squeeze(1)
    return kept[torch.arange(kept.shape[0], device=kept.device), index]


def is_one(rows: int) -> bool:
    """Whether there is one row, for which the places alone say where: a text that is written is one."""
    return is_known(rows) and rows == 1


def where_active(active: Tensor | None, new: AttentionState, old: AttentionState) -> AttentionState:
    """The new state where a row still had a token, the old one where not; active [N] bool, None for every row."""
    if active is None:
        return new
    return map_fields(
        lambda a, b: torch.where(active.view(-1, *[1] * (a.ndim - 1)), a, b.to(a.dtype)),
        new,
        old,
    )


def blank_state(like: Tensor, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> AttentionState:
    """The state before the first token: fields of these shapes, zero but for what is empty otherwise."""
    n = next(iter(shapes.values()))[0]
    dtypes = {name: kinds[0] for name, kinds in STATE_DTYPES.items()} | dtypes
    fields = {
        name: like.new_full(shape, EMPTY_VALUES.get(name, 0), dtype=dtypes.get(name, like.dtype))
        for name, shape in shapes.items()
    }
    return AttentionState(torch.zeros(n, dtype=torch.int64, device=like.device), **fields)


def token(inputs: Inputs, t: int) -> Inputs:
    """The inputs of position t alone: [B, ...] for [B, T, ...]."""
    return changed_rows(inputs, lambda x: x[:, t])


def over_steps(
    step: Step, inputs: Inputs, lengths: Tensor | None, state: AttentionState
) -> tuple[list[Tensor], AttentionState]:
    """([o [B, T, Hq, V], log mass [B, T, Hq]], the state after them) of one step after the other.

    step: called with the inputs of one position and the state, returns (o, log mass, the fields that changed). A row's
    state stays as it is from ``lengths`` [B] on.
    """
    q, v = inputs.q, inputs.v
    outputs, masses = [], []
    for t in range(q.shape[1]):
        o, log_mass, fields = step(token(inputs, t), state)
        active = None if lengths is None else t < lengths
        state = where_active(active, state._replace(position=state.position + 1, **fields), state)
        outputs.append(o)
        masses.append(log_mass)
    if not outputs:
        nothing = q.new_zeros(*q.shape[:3], dtype=work_dtype(q))
        return [q.new_zeros(*q.shape[:3], v.shape[3]), nothing], state
    return [torch.stack(outputs, 1), torch.stack(masses, 1)], state
