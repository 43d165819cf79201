"""Hybrid attention from the gated and the window kernels, for what the fused kernels leave out."""

from __future__ import annotations

from torch import Tensor

from lizard_ops.common.autocast import without_autocast
from lizard_ops.common.features import expand_features
from lizard_ops.common.padding import compact, compaction
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import layout_of, offset_fields
from lizard_ops.gated_attn.chunk_torch import linear_rows
from lizard_ops.gated_attn.triton.chunk import chunk_gated_triton
from lizard_ops.hybrid_attn.mix import mixed
from lizard_ops.window_attn.triton.chunk import window_triton


def composed_hybrid(
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
    weight: Tensor | None,
    merge_mass: str,
    outside: bool,
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
    """Both branches in launches of their own, the mix in PyTorch; with feature_map="exp" the linear one too."""
    rows = {"cu_seqlens": cu_seqlens, "padding_mask": padding_mask}
    o_win, local, lse, spread = window_triton(
        q, k, v, window, anchors=anchors, sinks=sinks, scale=scale, softcap=softcap, initial_state=initial_state,
        output_final_state=output_final_state, with_max=mix == "merge" and merge_mass == "relative", **rows,
    )  # fmt: skip
    offset = window if outside else 0
    linear = linear_in_pytorch if feature_map == "exp" else linear_in_triton
    o_lin, log_mass, fields = linear(
        fq, fk, v, g, feature_map=feature_map, scale=feature_scale, normalize=normalize, offset=offset,
        anchors=anchors, state=initial_state, final=output_final_state, gate_form=gate_form, **rows,
    )  # fmt: skip
    log_window = spread if merge_mass == "relative" else lse
    o = mixed(
        o_lin.float(), log_mass, o_win.float(), log_window, spread, mix=mix, weight=weight, merge_mass="absolute"
    )  # fmt: skip
    return o.to(q.dtype), None if local is None else local._replace(**fields)


def linear_in_pytorch(
    fq: Tensor, fk: Tensor, v: Tensor, g: Tensor | None, *, feature_map: str, scale: float, normalize: bool,
    offset: int, anchors: int, state: AttentionState | None, final: bool, cu_seqlens: Tensor | None,
    padding_mask: Tensor | None, gate_form: str,
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:  # fmt: skip
    """(o, log mass, state fields) of the linear branch."""

    def op(rows, lengths, state):
        fq, fk, v, g = rows
        o, log_mass, fields = linear_rows(
            fq, fk, v, g, lengths, state, feature_map=feature_map, scale=scale, normalize=normalize, offset=offset,
            anchors=anchors, gate_form=gate_form, chunk_size=None,
        )  # fmt: skip
        return [o, log_mass], AttentionState(layout_of(fq, state, None, lengths).end, **fields)

    fills = (0.0, -float("inf"))
    with without_autocast(v):
        (o, log_mass), after = over_rows(op, (fq, fk, v, g), fills, state, cu_seqlens, padding_mask)
    fields = {} if after is None else {name: x for name, x in after._asdict().items() if x is not None}
    return o, log_mass, fields if final else {}


def linear_in_triton(
    fq: Tensor, fk: Tensor, v: Tensor, g: Tensor | None, *, feature_map: str, scale: float, normalize: bool,
    offset: int, anchors: int, state: AttentionState | None, final: bool, cu_seqlens: Tensor | None,
    padding_mask: Tensor | None, gate_form: str,
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:  # fmt: skip
    """The same, with features that are expanded here."""
    phi_q, phi_k = (expand_features(x, feature_map)[0].to(v.dtype) for x in (fq, fk))
    past = state
    if state is not None:
        ring = state.ring_fk if state.ring_fk is None else expand_features(state.ring_fk, feature_map)[0]
        past = AttentionState(state.position, state.s, state.z, ring_v=state.ring_v, ring_fk=ring, ring_g=state.ring_g)
        past = past if offset else past._replace(ring_v=None, ring_fk=None, ring_g=None)
    o, after, log_mass = chunk_gated_triton(
        phi_q, phi_k, v, g, scale=scale, normalize=normalize, window_offset=offset, anchors=anchors,
        initial_state=past, output_final_state=final, cu_seqlens=cu_seqlens, padding_mask=padding_mask,
        gate_form=gate_form, chunk_size=None,
    )  # fmt: skip
    if after is None:
        return o, log_mass, {}
    lengths = None
    if padding_mask is not None:
        plan = compaction(padding_mask)
        fk, v, g, lengths = compact(fk, plan), compact(v, plan), compact(g, plan), plan.lengths
    layout = layout_of(fk, state, cu_seqlens, lengths)
    return o, log_mass, {"s": after.s, "z": after.z, **offset_fields(fk, v, g, state, offset, layout)}
