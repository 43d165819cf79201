"""Sliding-window attention on the GPU: the kernels between padding, packing and carried states."""

from __future__ import annotations

import math

from torch import Tensor

from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.rows import changed_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import anchor_rows, key_stream, layout_of, window_fields
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions
from lizard_ops.window_attn.triton.op import window_forward


def window_triton(
    inputs: WindowInputs, options: WindowOptions, with_max: bool = False
) -> tuple[Tensor, AttentionState | None, Tensor, Tensor]:
    """(o, state, lse, lse less the row maximum) of ``window_attn``, whose arguments come here checked.

    The last is empty without ``with_max``.
    """
    initial_state, anchors, lengths = inputs.initial_state, options.anchors, None
    if inputs.padding_mask is not None:
        plan = compaction(inputs.padding_mask)
        inputs, lengths = changed_rows(inputs, lambda x: compact(x, plan)), plan.lengths
    q, k, v, sinks = inputs.q, inputs.k, inputs.v, inputs.sinks
    anchor_k = anchor_v = None
    if initial_state is not None or options.output_final_state:
        layout = layout_of(q, initial_state, inputs.cu_seqlens, lengths)
        kept_k, kept_v = (None, None) if initial_state is None else (initial_state.anchor_k, initial_state.anchor_v)
        if anchors:
            anchor_k, anchor_v = anchor_rows(k, kept_k, anchors, layout), anchor_rows(v, kept_v, anchors, layout)
    carried = initial_state is not None
    o, lse, spread, _ = window_forward(
        q=q,
        k=key_stream(k, initial_state.ring_k, layout) if carried else k,
        v=key_stream(v, initial_state.ring_v, layout) if carried else v,
        anchor_k=anchor_k if carried else None,
        anchor_v=anchor_v if carried else None,
        sinks=None if sinks is None else sinks.float().logsumexp(-1),
        first=initial_state.position if carried else None,
        cu_seqlens=inputs.cu_seqlens,
        window=options.window,
        anchors=anchors,
        prefix=options.window if carried else 0,
        scale=options.scale,
        with_max=with_max,
        softcap=options.softcap,
    )
    final = None
    if options.output_final_state:
        fields = window_fields(k, v, anchor_k, anchor_v, initial_state, options.window, layout)
        final = AttentionState(layout.end, **fields)
    if inputs.padding_mask is not None:
        o, lse = restore(o, plan), restore(lse, plan, -math.inf)
        spread = restore(spread, plan) if with_max else spread
    return o, final, lse, spread
