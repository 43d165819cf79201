"""Both branches and their mix as the formulas read, built from the references of the two ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common.checks import check_softcap, state_heads, work_dtype
from lizard_ops.common.sequences import put_rows, sequence_slices, stack_states, state_of
from lizard_ops.common.state import AttentionState
from lizard_ops.gated_attn.naive import linear_branch
from lizard_ops.hybrid_attn.arguments import hybrid_arguments
from lizard_ops.window_attn.naive import window_branch


def naive_hybrid_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor | None,
    window: int,
    *,
    anchors: int = 0,
    sinks: Tensor | None = None,
    sink_form: str = "exp",
    mix: str = "sum",
    alpha: float | Tensor | None = None,
    merge_bias: Tensor | None = None,
    merge_mass: str = "relative",
    coverage: str = "all",
    feature_map: str = "identity",
    normalize: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    feature_scale: float | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, AttentionState | None]:
    """The reference of ``chunk_hybrid_attn``, whose docstring says what every argument is."""
    g, sinks, alpha, merge_bias, scale, feature_scale = hybrid_arguments(
        q, k, v, fq, fk, g, window, anchors, sinks, sink_form, mix, alpha, merge_bias, merge_mass, coverage,
        feature_map, normalize, scale, feature_scale, initial_state, cu_seqlens, padding_mask,
    )  # fmt: skip
    check_softcap(softcap)
    heads, work = state_heads(q, v, g), work_dtype(q)
    offset = window if coverage == "outside" else 0
    outputs, states = [], []
    slices = sequence_slices(q.shape[0], q.shape[1], cu_seqlens, padding_mask, q.device)
    for n, (row, at) in enumerate(slices):
        past = state_of(initial_state, n)
        g_row = None if g is None else g[row, at]
        o_lin, log_mass, linear = linear_branch(
            fq[row, at], fk[row, at], v[row, at], g_row, past,
            heads=heads, feature_map=feature_map, scale=feature_scale, normalize=normalize, offset=offset,
            anchors=anchors,
        )  # fmt: skip
        o_win, lse, row_max, local = window_branch(
            q[row, at], k[row, at], v[row, at], past,
            window=window, anchors=anchors, sinks=sinks, sink_form=sink_form, scale=scale, softcap=softcap,
        )  # fmt: skip
        o_lin, o_win = o_lin.to(work), o_win.to(work)
        weight = alpha if mix == "sum" else merge_bias
        weight = torch.full_like(lse, float(mix == "sum")) if weight is None else weight.to(work)
        weight = weight[row, at] if weight.ndim == 3 else weight.expand_as(lse)  # [T, Hq]
        if mix == "sum":
            o = o_lin + weight.unsqueeze(-1) * o_win
        else:
            some = log_mass > -math.inf
            log_window = lse - row_max if merge_mass == "relative" else lse
            share = torch.sigmoid(torch.where(some, log_mass, 0.0) - log_window + weight)
            o = torch.lerp(o_win, o_lin, torch.where(some, share, 0.0).unsqueeze(-1))
        outputs.append(o.to(q.dtype))
        states.append(local._replace(**{name: field for name, field in linear._asdict().items() if field is not None}))
    o = put_rows(q.new_zeros(*q.shape[:3], v.shape[3]), slices, outputs)
    return o, stack_states(states) if output_final_state else None
