"""Hybrid attention on the GPU: the kernels between padding, packing and carried states."""

from __future__ import annotations

from torch import Tensor

from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.rows import changed_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import anchor_rows, key_stream, layout_of, offset_fields, window_fields
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.triton.call import FusedInputs, Known, chosen
from lizard_ops.hybrid_attn.triton.composed import composed_hybrid
from lizard_ops.hybrid_attn.triton.kept_chunk import kept_hybrid
from lizard_ops.hybrid_attn.triton.kept_state import kept_between_states
from lizard_ops.hybrid_attn.triton.op import hybrid

NO_STATE = AttentionState(position=None)


def chunk_hybrid_triton(
    inputs: HybridInputs, options: HybridOptions, known: Known | None = None
) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of ``chunk_hybrid_attn``, whose arguments come here checked. known: the kind of
    such a call without a state.

    The kernels fuse gates that are one per head or for all heads. Gates per channel and gate_form="absorbed" run the
    gated and the window kernels one after the other, and with exponential features that gated branch in PyTorch.
    """
    if options.gate_form == "absorbed" or (inputs.g is not None and inputs.g.ndim == 4):
        return composed_hybrid(inputs, options)
    weight = inputs.weight
    if weight is not None:
        weight = weight.float().expand(inputs.q.shape[:3])
    initial_state, cu_seqlens, lengths = inputs.initial_state, inputs.cu_seqlens, None
    if inputs.scores is not None and (initial_state is not None or options.output_final_state):
        return kept_between_states(inputs, options)
    if inputs.expiry is not None or inputs.scores is not None:
        return kept_hybrid(inputs, weight, options), None
    if inputs.padding_mask is not None:
        plan = compaction(inputs.padding_mask)
        weight, lengths = compact(weight, plan), plan.lengths
        inputs = changed_rows(inputs._replace(alpha=None, merge_bias=None), lambda x: compact(x, plan))
    q, k, v, fk, g, sinks = inputs.q, inputs.k, inputs.v, inputs.fk, inputs.g, inputs.sinks
    carried = initial_state is not None
    states = carried or options.output_final_state
    layout = layout_of(q, initial_state, cu_seqlens, lengths) if states else None
    state = initial_state if carried else NO_STATE
    anchor_k = anchor_v = None
    if options.anchors and states:
        anchor_k, anchor_v = (
            anchor_rows(x, kept, options.anchors, layout) for x, kept in ((k, state.anchor_k), (v, state.anchor_v))
        )
    x = FusedInputs(
        q=q,
        k=key_stream(k, state.ring_k, layout),
        v=key_stream(v, state.ring_v, layout),
        fq=inputs.fq,
        fk=key_stream(fk, state.ring_fk, layout),
        g=None if g is None else key_stream(g, state.ring_g, layout).float(),
        weight=weight,
        sink=None if sinks is None else sinks.float().logsumexp(-1),
        anchor_k=anchor_k if carried else None,
        anchor_v=anchor_v if carried else None,
        s=state.s,
        z=state.z,
        position=layout.position if carried else None,
        cu_seqlens=cu_seqlens,
        lengths=lengths,
        log_scale=state.log_scale,
    )
    o, s, z, log_scale, *_ = hybrid(x, chosen(options), options.output_final_state, known)
    final = None
    if options.output_final_state:
        fields = window_fields(k, v, anchor_k, anchor_v, initial_state, options.window, layout)
        offset = offset_fields(fk, v, g, initial_state, options.offset, layout, fields["ring_v"])
        log_scale = log_scale.detach() if options.feature_map == "exp" else None
        final = AttentionState(position=layout.end, s=s, z=z, log_scale=log_scale, **(fields | offset))
    return (o if inputs.padding_mask is None else restore(o, plan)), final
