"""One position after another: what the recurrent ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.state import AttentionState


def put_at(kept: Tensor, index: Tensor, new: Tensor, inplace: bool = False) -> Tensor:
    """kept [N, M, ...] with new [N, ...] at place ``index`` [N] of each row; out of place in the dtype of new."""
    rows = torch.arange(kept.shape[0], device=kept.device)
    if inplace:
        return kept.index_put_((rows, index), new.to(kept.dtype))
    return kept.to(new.dtype).index_put((rows, index), new)


def take_at(kept: Tensor, index: Tensor) -> Tensor:
    """[N, ...]: place ``index`` [N] of each row of kept [N, M, ...]."""
    return kept[torch.arange(kept.shape[0], device=kept.device), index]


def where_active(active: Tensor | None, new: AttentionState, old: AttentionState) -> AttentionState:
    """The new state where a row still had a token, the old one where not; active [N] bool, None for every row."""
    if active is None:
        return new
    pairs = zip(new, old, strict=True)
    return AttentionState._make(
        None if a is None or b is None else torch.where(active.view(-1, *[1] * (a.ndim - 1)), a, b.to(a.dtype))
        for a, b in pairs
    )


def blank_state(like: Tensor, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> AttentionState:
    """The state before the first token: fields of these shapes, zero but for an empty log scale."""
    n = next(iter(shapes.values()))[0]
    fields = {
        name: like.new_full(shape, float("-inf") if name == "log_scale" else 0.0, dtype=dtypes.get(name, like.dtype))
        for name, shape in shapes.items()
    }
    return AttentionState(torch.zeros(n, dtype=torch.int64, device=like.device), **fields)
