"""Both branches and their mix as the formulas read, built from the references of the two ops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common.checks import state_heads, work_dtype
from lizard_ops.common.sequences import one_sequence, put_rows, sequence_slices, stack_states
from lizard_ops.common.state import AttentionState
from lizard_ops.gated_attn.naive import linear_branch
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments, linear_inputs
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
    expiry: Tensor | None = None,
) -> tuple[Tensor, AttentionState | None]:
    """The reference of ``chunk_hybrid_attn``, whose docstring says what every argument is.

    It takes any expiry from position + window on: several keys of a head at one query too, and any number alive.
    """
    inputs, options = hybrid_arguments(
        HybridInputs(
            q=q, k=k, v=v, fq=fq, fk=fk, g=g, sinks=sinks, alpha=alpha, merge_bias=merge_bias,
            initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask, expiry=expiry,
        ),
        HybridOptions(
            window=window, anchors=anchors, sink_form=sink_form, mix=mix, merge_mass=merge_mass, coverage=coverage,
            feature_map=feature_map, normalize=normalize, scale=scale, softcap=softcap, feature_scale=feature_scale,
            output_final_state=output_final_state,
        ),
    )  # fmt: skip
    return naive_hybrid(inputs, options)


def naive_hybrid(inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of checked arguments."""
    q, v = inputs.q, inputs.v
    heads, work, sums = state_heads(q, v, inputs.g), work_dtype(q), options.mix == "sum"
    outputs, states = [], []
    slices = sequence_slices(inputs)
    for n, (row, at) in enumerate(slices):
        x = one_sequence(inputs, n, row, at)
        o_lin, log_mass, linear = linear_branch(linear_inputs(x, options), heads, options.linear)
        o_win, lse, row_max, local = window_branch(x.local, options.local)
        o_lin, o_win = o_lin.to(work), o_win.to(work)
        weight = torch.full_like(lse, float(sums)) if x.weight is None else x.weight.to(work).expand_as(lse)  # [T, Hq]
        if sums:
            o = o_lin + weight.unsqueeze(-1) * o_win
        else:
            some = log_mass > -math.inf
            log_window = lse - row_max if options.merge_mass == "relative" else lse
            share = torch.sigmoid(torch.where(some, log_mass, 0.0) - log_window + weight)
            o = torch.lerp(o_win, o_lin, torch.where(some, share, 0.0).unsqueeze(-1))
        outputs.append(o.to(q.dtype))
        states.append(local._replace(**{name: field for name, field in linear._asdict().items() if field is not None}))
    o = put_rows(q.new_zeros(*q.shape[:3], v.shape[3]), slices, outputs)
    return o, stack_states(states) if options.output_final_state else None
