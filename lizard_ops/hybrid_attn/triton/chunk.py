"""Hybrid attention on the GPU: the kernels between padding, packing and carried states."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import anchor_rows, key_stream, layout_of, offset_fields, window_fields
from lizard_ops.hybrid_attn.triton.composed import composed_hybrid
from lizard_ops.hybrid_attn.triton.op import hybrid_forward


def chunk_hybrid_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor | None,
    window: int,
    *,
    anchors: int,
    sinks: Tensor | None,
    mix: str,
    alpha: Tensor | None,
    merge_bias: Tensor | None,
    merge_mass: str,
    coverage: str,
    feature_map: str,
    normalize: bool,
    scale: float,
    softcap: float | None,
    feature_scale: float,
    initial_state: AttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
    gate_form: str,
) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of ``chunk_hybrid_attn``, whose arguments come here checked.

    The kernels fuse gates that are one a head or for all heads. Gates a channel and gate_form="absorbed" run the gated
    and the window kernels one after the other, and with exponential features that gated branch in PyTorch.
    Under autocast q, k, v, fq and fk take its dtype; gates, weights and sums stay float32.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v, fq, fk = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v, fq, fk))
    weight = alpha if mix == "sum" else merge_bias
    if gate_form == "absorbed" or (g is not None and g.ndim == 4):
        return composed_hybrid(
            q, k, v, fq, fk, g, window, anchors=anchors, sinks=sinks, mix=mix, weight=weight, merge_mass=merge_mass,
            outside=coverage == "outside", feature_map=feature_map, normalize=normalize, scale=scale,
            softcap=softcap, feature_scale=feature_scale, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask,
            gate_form=gate_form,
        )  # fmt: skip
    if weight is not None:
        weight = weight.float().expand(q.shape[:3])
    lengths = None
    if padding_mask is not None:
        plan = compaction(padding_mask)
        q, k, v, fq, fk, g, weight = (compact(x, plan) for x in (q, k, v, fq, fk, g, weight))
        lengths = plan.lengths
    layout = layout_of(q, initial_state, cu_seqlens, lengths)
    carried, outside = initial_state is not None, coverage == "outside"
    state = initial_state if carried else AttentionState(layout.position)
    anchor_k = anchor_v = None
    if anchors and (carried or output_final_state):
        anchor_k, anchor_v = (
            anchor_rows(x, kept, anchors, layout) for x, kept in ((k, state.anchor_k), (v, state.anchor_v))
        )
    o, s, z, log_scale, *_ = hybrid_forward(
        q,
        key_stream(k, state.ring_k, layout),
        key_stream(v, state.ring_v, layout),
        fq,
        key_stream(fk, state.ring_fk, layout),
        None if g is None else key_stream(g, state.ring_g, layout).float(),
        weight,
        None if sinks is None else sinks.float().logsumexp(-1),
        anchor_k if carried else None,
        anchor_v if carried else None,
        state.s,
        state.z,
        layout.position if carried else None,
        cu_seqlens,
        lengths,
        window,
        anchors,
        outside,
        merge_mass if mix == "merge" else mix,
        normalize,
        feature_map,
        scale,
        feature_scale,
        output_final_state,
        softcap,
        state.log_scale,
    )
    final = None
    if output_final_state:
        offset = offset_fields(fk, v, g, initial_state, window if outside else 0, layout)
        fields = window_fields(k, v, anchor_k, anchor_v, initial_state, window, layout)
        log_scale = log_scale.detach() if feature_map == "exp" else None
        final = AttentionState(layout.end, s, z, log_scale, **(fields | offset))
    return (o if padding_mask is None else restore(o, plan)), final
