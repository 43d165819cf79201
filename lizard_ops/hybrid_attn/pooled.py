"""Calls whose state lies in a pool of pages: the sequences' own are taken out, read on, and written back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.pages import PoolRows
from lizard_ops.common.rows import changed_rows
from lizard_ops.common.sequences import sequence_slices
from lizard_ops.common.state import AttentionState, map_fields
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions

Form = Callable[[HybridInputs, HybridOptions], tuple[Tensor, AttentionState | None]]


def on_pool(form: Form, inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o, the pool) of a form that takes the states of its sequences; without ``state_indices`` the form itself."""
    pool = inputs.initial_state
    if inputs.state_indices is None or pool is None:
        return form(inputs, options)
    rows = PoolRows.of(inputs.state_indices, inputs.has_state)
    fields = {name: x for name, x in pool._asdict().items() if x is not None}
    taken = AttentionState(**{name: rows.take(name, x) for name, x in fields.items()})
    alone = inputs._replace(initial_state=taken, state_indices=None, has_state=None)
    o, new = form(alone, options._replace(output_final_state=True))
    for name, x in fields.items():
        rows.put(x, getattr(new, name))
    return rows.blanked(o, inputs.cu_seqlens), pool


def naive_on_pool(form: Form, inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """``on_pool`` as it reads: each sequence alone, its state copied out of its page and into it."""
    pool, indices, v = inputs.initial_state, inputs.state_indices, inputs.v
    if indices is None or pool is None:
        return form(inputs, options)
    checks.want_values("state_indices", indices, "the naive op")
    o = inputs.q.new_zeros(*inputs.q.shape[:3], v.shape[3])
    for n, (row, at) in enumerate(sequence_slices(inputs)):
        page = int(indices[n])
        if page < 0:
            continue
        begins = inputs.has_state is not None and not bool(inputs.has_state[n])
        state = None if begins else map_fields(torch.clone, one_page(pool, page))
        nothing = dict(cu_seqlens=None, padding_mask=None, state_indices=None, has_state=None)
        one = changed_rows(inputs, partial(one_row, row=row, at=at), initial_state=state, **nothing)
        part, new = form(one, options._replace(output_final_state=True, inplace=False))
        o[row, at] = part[0]
        for name, x in pool._asdict().items():
            if x is not None:
                x[page] = getattr(new, name)[0].to(x.dtype)
    return o, pool


def one_page(pool: AttentionState, page: int) -> AttentionState:
    return map_fields(lambda x: x[page : page + 1], pool)


def one_row(x: Tensor, row: int, at: Tensor) -> Tensor:
    return x[row, at].unsqueeze(0)


def check_pool_gradients(inputs: HybridInputs) -> None:
    """Pages are written to, so that nothing may need what was in them before."""
    if inputs.state_indices is not None:
        recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors())
        checks.want(not recorded, "state_indices", inputs.state_indices, "None where gradients are recorded")
