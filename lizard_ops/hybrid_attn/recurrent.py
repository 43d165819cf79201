"""Both branches one position at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.checks import window_state_shapes, work_dtype
from lizard_ops.common.numerics import tied_to
from lizard_ops.common.places import padded
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState, map_fields, overwrite_state
from lizard_ops.common.steps import blank_state, take_at, token, where_active
from lizard_ops.gated_attn.recurrent import blank_linear_state, linear_step
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, scored_state_shapes
from lizard_ops.hybrid_attn.keeping import Fields, keep_step
from lizard_ops.hybrid_attn.mix import mixed
from lizard_ops.hybrid_attn.one_text import one_text_step, takes_one_text
from lizard_ops.window_attn.recurrent import window_step

SEEN = (("kept_k", 0), ("kept_v", 0), ("kept_positions", -1))  # by the window branch; what is no place


def recurrent_hybrid_torch(inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of ``recurrent_hybrid_attn``, whose arguments come here checked.

    With ``inplace`` one token per row updates the state where it lies; padding, packing and other lengths work on
    copies and overwrite it at the end.
    """
    if inputs.initial_state is not None and takes_one_text(inputs, options):
        if not options.inplace:
            inputs = inputs._replace(initial_state=map_fields(Tensor.clone, inputs.initial_state))
        o = one_text_step(inputs, options)
        return o, inputs.initial_state if options.output_final_state else None
    one_token = inputs.q.shape[1] == 1 and inputs.cu_seqlens is None and inputs.padding_mask is None
    direct, window = options.inplace and one_token, options.window

    def op(inputs, lengths):
        state = blank_hybrid_state(inputs, options) if inputs.initial_state is None else inputs.initial_state
        outputs = []
        for t in range(inputs.q.shape[1]):
            x = token(inputs, t)
            scored: Fields = {}
            kept = joining = None
            if x.scores is not None:
                scored, joining = keep_step(x, state, options, inplace=direct)
                kept = tuple(padded(scored[name], options.kept_keys, fill) for name, fill in SEEN)
            leaving_v = take_at(state.ring_v, state.position % window) if options.offset else None
            o_win, lse, row_max, local = window_step(x.local, state, options.local, direct, kept)
            shared = (local["ring_v"], leaving_v) if options.offset else None
            o_lin, log_mass, linear = linear_step(x.linear, state, options.linear, shared, direct, joining)
            o = mixed(
                o_lin, log_mass, o_win, lse, row_max, mix=options.mix, weight=x.weight, merge_mass=options.merge_mass
            )  # fmt: skip
            active = None if lengths is None else t < lengths
            position = state.position.add_(1) if direct else state.position + 1
            new = state._replace(position=position, **(local | linear | scored))
            state = where_active(active, new, state)
            outputs.append(o)
        blank = inputs.q.new_zeros(*inputs.q.shape[:3], inputs.v.shape[3])
        return [torch.stack(outputs, 1) if outputs else blank], state

    (o,), state = over_rows(op, inputs, (0.0,))
    if options.inplace and not direct:
        assert inputs.initial_state is not None and state is not None
        state = overwrite_state(inputs.initial_state, state)
    return tied_to(o.to(inputs.q.dtype), *inputs.tensors()), state if options.output_final_state else None


def blank_hybrid_state(inputs: HybridInputs, options: HybridOptions) -> AttentionState:
    """The state of both branches before the first token of rows [B, T, ...]."""
    k, v = inputs.k, inputs.v
    n, work = k.shape[0], work_dtype(v)
    shapes = window_state_shapes(n, k, v, options.window, options.anchors)
    if inputs.scores is not None:
        shapes |= scored_state_shapes(inputs, options, n)
    dtypes = {"kept_fk": inputs.fk.dtype, "kept_g": work, "log_scale": work}
    rest = blank_state(k, shapes, dtypes)
    linear = blank_linear_state(inputs.linear, options.offset, options.feature_map)
    return linear._replace(**{name: field for name, field in rest._asdict().items() if field is not None})
