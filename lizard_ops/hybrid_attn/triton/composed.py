"""Hybrid attention from the gated and the window kernels, for what the fused kernels leave out."""

from __future__ import annotations

from torch import Tensor

from lizard_ops.common.features import expand_features
from lizard_ops.common.padding import compact, compaction
from lizard_ops.common.rows import changed_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import layout_of, offset_fields
from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions
from lizard_ops.gated_attn.chunk_torch import linear_torch
from lizard_ops.gated_attn.triton.chunk import chunk_gated_triton
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.mix import mixed
from lizard_ops.window_attn.triton.chunk import window_triton

Fields = dict[str, Tensor | None]


def composed_hybrid(inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """Both branches in launches of their own, the mix in PyTorch; with feature_map="exp" the linear one too."""
    relative = options.merge_mass == "relative"
    o_win, local, lse, spread = window_triton(
        inputs.local, options.local, with_max=options.mix == "merge" and relative
    )  # fmt: skip
    linear = linear_in_pytorch if options.feature_map == "exp" else linear_in_triton
    o_lin, log_mass, fields = linear(inputs.linear, options.linear)
    o = mixed(
        o_lin.float(), log_mass, o_win.float(), spread if relative else lse, spread, mix=options.mix,
        weight=inputs.weight, merge_mass="absolute",
    )  # fmt: skip
    return o.to(inputs.q.dtype), None if local is None else local._replace(**fields)


def linear_in_pytorch(inputs: GatedInputs, options: GatedOptions) -> tuple[Tensor, Tensor, Fields]:
    """(o, log mass, state fields) of the linear branch."""
    o, after, log_mass = linear_torch(inputs, options)
    fields = {} if after is None else {name: x for name, x in after._asdict().items() if x is not None}
    return o, log_mass, fields


def linear_in_triton(inputs: GatedInputs, options: GatedOptions) -> tuple[Tensor, Tensor, Fields]:
    """The same, with features that are expanded here."""
    feature_map, state = options.feature_map, inputs.initial_state
    phi_q, phi_k = (expand_features(x, feature_map)[0].to(inputs.v.dtype) for x in (inputs.q, inputs.k))
    past = state
    if state is not None:
        ring = state.ring_fk if state.ring_fk is None else expand_features(state.ring_fk, feature_map)[0]
        past = AttentionState(
            position=state.position, s=state.s, z=state.z, ring_v=state.ring_v, ring_fk=ring, ring_g=state.ring_g
        )
        past = past if options.window_offset else past._replace(ring_v=None, ring_fk=None, ring_g=None)
    o, after, log_mass = chunk_gated_triton(inputs._replace(q=phi_q, k=phi_k, initial_state=past), options)
    if after is None:
        return o, log_mass, {}
    lengths = None
    if inputs.padding_mask is not None:
        plan = compaction(inputs.padding_mask)
        inputs, lengths = changed_rows(inputs, lambda x: compact(x, plan)), plan.lengths
    layout = layout_of(inputs.k, state, inputs.cu_seqlens, lengths)
    held = offset_fields(inputs.k, inputs.v, inputs.g, state, options.window_offset, layout)
    return o, log_mass, {"s": after.s, "z": after.z, **held}
