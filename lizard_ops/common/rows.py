"""One dense form for the PyTorch paths: full, padded and packed inputs all become right-padded rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common.checks import want_values
from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.sizes import is_known
from lizard_ops.common.state import map_fields
from lizard_ops.common.streams import Layout, layout_of, take_rows

# An op's inputs: a NamedTuple with fields initial_state, cu_seqlens and padding_mask, whose ``by_token`` names those of
# its tensors that have a row per token, [B, T, ...]: GatedInputs, WindowInputs, HybridInputs, ExpiryInputs.
Inputs = Any
TILE = 64  # rows; at least those of a tile of any op
SPARE = 2  # tiles
Final = Any  # what an op leaves of each sequence, a NamedTuple as ``common.state.map_fields`` takes it, or None
RowOp = Callable[[Inputs, Tensor | None], tuple[Sequence[Tensor], Final]]


def changed_rows(inputs: Inputs, change: Callable[[Tensor], Tensor | None], **fields: Any) -> Inputs:
    """The inputs with every tensor that has a row per token changed, and these fields replaced."""
    rows = {name: None if x is None else change(x) for name, x in inputs.by_token().items()}
    return inputs._replace(**rows, **fields)


def over_rows(op: RowOp, inputs: Inputs, fills: Sequence[float], offset: int = 0) -> tuple[Sequence[Tensor], Final]:
    """Run ``op(inputs, lengths) -> (outputs, state)`` on inputs whose rows [B, T, ...] are of any kind.

    op sees real tokens first, ``lengths`` [B] of them (None: all), zeros after. What it returns goes back to its
    places, with one of ``fills`` an output at padding. offset: newest keys that the op leaves out.
    """
    if not is_known(inputs.q.shape[1]):
        op = partial(_over_any_length, op, offset)
    if inputs.padding_mask is not None:
        plan = compaction(inputs.padding_mask)
        compacted = changed_rows(inputs, lambda x: compact(x, plan), padding_mask=None)
        outputs, final = op(compacted, plan.lengths)
        return [restore(o, plan, fill) for o, fill in zip(outputs, fills, strict=True)], final
    if inputs.cu_seqlens is None:
        return op(inputs, None)
    return _over_packed(op, inputs)


def _over_any_length(op: RowOp, offset: int, inputs: Inputs, lengths: Tensor | None) -> tuple[Sequence[Tensor], Final]:
    """``op`` on rows made longer, by zeros after them: a whole number of tiles, so many that no tile is cut short.

    One program then does for rows shorter than a tile, and than the offset, and for longer ones: there are always more
    tiles than those whose number would be a case of its own, 0 and 1.
    """
    batch, length = inputs.q.shape[:2]
    spare = TILE * ((offset + TILE - 1) // TILE + SPARE)
    more = (length + spare + TILE - 1) // TILE * TILE - length  # one quotient, so that sizes divide as symbols do
    if lengths is None:
        lengths = torch.full((batch,), length, dtype=torch.int64, device=inputs.q.device)
    longer = changed_rows(inputs, lambda x: F.pad(x, (0, 0) * (x.ndim - 2) + (0, more)))
    outputs, final = op(longer, lengths)
    wanted = torch.arange(length, device=lengths.device)  # a slice would compare strides with the open length
    return [o.index_select(1, wanted) for o in outputs], final


def _over_packed(op: RowOp, inputs: Inputs) -> tuple[Sequence[Tensor], Final]:
    """Sequences whose lengths share their highest bit run together: at most 2 T rows in at most log T calls."""
    want_values("cu_seqlens", inputs.cu_seqlens, "the PyTorch path")
    device, state = inputs.q.device, inputs.initial_state
    layout = layout_of(inputs.q, None, inputs.cu_seqlens)
    classes: dict[int, list[int]] = {}
    for n, length in enumerate(layout.length.tolist()):
        classes.setdefault(length.bit_length(), []).append(n)

    order: list[int] = []
    outputs: list[list[Tensor]] = []
    places: list[Tensor] = []
    finals: list[Final] = []
    for members in classes.values():
        of = torch.tensor(members, device=device)
        part = layout._replace(start=layout.start[of], length=layout.length[of])
        index = torch.arange(int(part.length.max()), device=device).expand(len(members), -1)
        begin = None if state is None else map_fields(partial(torch.index_select, dim=0, index=of), state)
        padded = changed_rows(inputs, partial(_padded, layout=part, index=index), initial_state=begin, cu_seqlens=None)
        results, final = op(padded, part.length)
        there = index < part.length.unsqueeze(1)
        places.append((part.start.unsqueeze(1) + index)[there])
        outputs.append([o[there] for o in results])
        order += members
        finals += [] if final is None else [final]
    back = torch.cat(places).argsort()
    whole = [torch.cat(o).index_select(0, back).unsqueeze(0) for o in zip(*outputs, strict=True)]
    if not finals:
        return whole, None
    sequence = torch.tensor(order, device=device).argsort()
    return whole, map_fields(lambda *parts: torch.cat(parts).index_select(0, sequence), *finals)


def _padded(x: Tensor, layout: Layout, index: Tensor) -> Tensor:
    return take_rows(x, layout, index)[0]
