"""Sliding-window attention on the GPU: the kernels between padding, packing and carried states."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import anchor_rows, key_stream, layout_of, window_fields
from lizard_ops.window_attn.triton.op import window_forward


def window_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    anchors: int,
    sinks: Tensor | None,
    scale: float,
    initial_state: AttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
    softcap: float | None = None,
    with_max: bool = False,
) -> tuple[Tensor, AttentionState | None, Tensor, Tensor]:
    """(o, state, lse, lse less the row maximum) of ``window_attn``, whose arguments come here checked.

    The last is empty without ``with_max``. Under autocast q, k and v take its dtype.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    lengths = None
    if padding_mask is not None:
        plan = compaction(padding_mask)
        q, k, v = (cast(Tensor, compact(x, plan)) for x in (q, k, v))
        lengths = plan.lengths
    sink_mass = None if sinks is None else sinks.float().logsumexp(-1)
    anchor_k = anchor_v = None
    if initial_state is not None or output_final_state:
        layout = layout_of(q, initial_state, cu_seqlens, lengths)
        kept_k, kept_v = (None, None) if initial_state is None else (initial_state.anchor_k, initial_state.anchor_v)
        if anchors:
            anchor_k, anchor_v = anchor_rows(k, kept_k, anchors, layout), anchor_rows(v, kept_v, anchors, layout)
    if initial_state is None:
        o, lse, spread, _ = window_forward(
            q, k, v, None, None, sink_mass, None, cu_seqlens, window, anchors, 0, scale, with_max, softcap
        )
    else:
        stream_k, stream_v = key_stream(k, initial_state.ring_k, layout), key_stream(v, initial_state.ring_v, layout)
        o, lse, spread, _ = window_forward(
            q, stream_k, stream_v, anchor_k, anchor_v, sink_mass, initial_state.position, cu_seqlens, window, anchors,
            window, scale, with_max, softcap,
        )  # fmt: skip
    final = None
    if output_final_state:
        final = AttentionState(layout.end, **window_fields(k, v, anchor_k, anchor_v, initial_state, window, layout))
    if padding_mask is not None:
        o, lse = restore(o, plan), restore(lse, plan, -math.inf)
        spread = restore(spread, plan) if with_max else spread
    return o, final, lse, spread
