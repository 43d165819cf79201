"""One dense form for the PyTorch paths: full, padded and packed inputs all become right-padded rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import layout_of, take_rows

Rows = Sequence[Tensor | None]
RowOp = Callable[[Rows, Tensor | None, AttentionState | None], tuple[Sequence[Tensor], AttentionState | None]]


def over_rows(
    op: RowOp,
    rows: Rows,
    fills: Sequence[float],
    state: AttentionState | None,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
) -> tuple[Sequence[Tensor], AttentionState | None]:
    """Run ``op(rows, lengths, state) -> (outputs, state)`` on rows [B, T, ...] of any kind.

    op sees real tokens first, ``lengths`` [B] of them (None: all), zeros after. What it returns goes back to its
    places, with one of ``fills`` an output at padding.
    """
    if padding_mask is not None:
        plan = compaction(padding_mask)
        outputs, final = op([compact(x, plan) for x in rows], plan.lengths, state)
        return [restore(o, plan, fill) for o, fill in zip(outputs, fills, strict=True)], final
    if cu_seqlens is None:
        return op(rows, None, state)
    return _over_packed(op, rows, state, cu_seqlens)


def _over_packed(
    op: RowOp, rows: Rows, state: AttentionState | None, cu_seqlens: Tensor
) -> tuple[Sequence[Tensor], AttentionState | None]:
    """Sequences whose lengths share their highest bit run together: at most 2 T rows in at most log T calls."""
    first = next(x for x in rows if x is not None)
    layout = layout_of(first, None, cu_seqlens)
    classes: dict[int, list[int]] = {}
    for n, length in enumerate(layout.length.tolist()):
        classes.setdefault(length.bit_length(), []).append(n)

    order: list[int] = []
    outputs: list[list[Tensor]] = []
    places: list[Tensor] = []
    finals: list[AttentionState] = []
    for members in classes.values():
        of = torch.tensor(members, device=first.device)
        part = layout._replace(start=layout.start[of], length=layout.length[of])
        index = torch.arange(int(part.length.max()), device=first.device).expand(len(members), -1)
        padded = [None if x is None else take_rows(x, part, index)[0] for x in rows]
        begin = None if state is None else AttentionState._make(None if x is None else x[of] for x in state)
        results, final = op(padded, part.length, begin)
        there = index < part.length.unsqueeze(1)
        places.append((part.start.unsqueeze(1) + index)[there])
        outputs.append([o[there] for o in results])
        order += members
        finals += [] if final is None else [final]
    back = torch.cat(places).argsort()
    whole = [torch.cat(o).index_select(0, back).unsqueeze(0) for o in zip(*outputs, strict=True)]
    return whole, _joined(finals, torch.tensor(order, device=first.device).argsort()) if finals else None


def _joined(states: list[AttentionState], order: Tensor) -> AttentionState:
    fields = zip(*states, strict=True)
    return AttentionState._make(None if x[0] is None else torch.cat(x).index_select(0, order) for x in fields)
