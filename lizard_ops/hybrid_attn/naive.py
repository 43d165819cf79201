"""Both branches and their mix as the formulas read, built from the references of the two ops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lizard_ops.common.checks import state_heads, work_dtype
from lizard_ops.common.sequences import (
    expiring_rows,
    one_sequence,
    positions_of,
    put_rows,
    sequence_slices,
    stack_states,
    with_ring,
)
from lizard_ops.common.state import AttentionState
from lizard_ops.gated_attn.naive import linear_branch
from lizard_ops.hybrid_attn.arguments import (
    HybridInputs,
    HybridOptions,
    expiry_options,
    hybrid_arguments,
    kept_places,
    linear_inputs,
    scored_state,
)
from lizard_ops.hybrid_attn.places import on_padded_places
from lizard_ops.key_expiry.arguments import NEVER, ExpiryInputs
from lizard_ops.key_expiry.naive import expiry_of_one
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
    scores: Tensor | None = None,
    score_delay: int = 0,
    expiry: Tensor | None = None,
    kept_keys: int | Sequence[int] | None = None,
) -> tuple[Tensor, AttentionState | None]:
    """The reference of ``chunk_hybrid_attn``, whose docstring says what every argument is.

    It takes any expiry from position + window on: several keys of a head at one query too, and any number alive, so
    that kept_keys counts with scores alone.
    """
    inputs, options = hybrid_arguments(
        HybridInputs(
            q=q, k=k, v=v, fq=fq, fk=fk, g=g, sinks=sinks, alpha=alpha, merge_bias=merge_bias,
            initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask, expiry=expiry, scores=scores,
        ),
        HybridOptions(
            window=window, anchors=anchors, sink_form=sink_form, mix=mix, merge_mass=merge_mass, coverage=coverage,
            feature_map=feature_map, normalize=normalize, scale=scale, softcap=softcap, feature_scale=feature_scale,
            output_final_state=output_final_state, kept_keys=kept_keys, score_delay=score_delay,
        ),
    )  # fmt: skip
    return on_padded_places(naive_hybrid, inputs, options)


def naive_hybrid(inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of checked arguments."""
    q, v = inputs.q, inputs.v
    heads, work, sums = state_heads(q, v, inputs.g), work_dtype(q), options.mix == "sum"
    outputs, states = [], []
    slices = sequence_slices(inputs)
    for n, (row, at) in enumerate(slices):
        x, scored = with_naive_expiries(one_sequence(inputs, n, row, at), options)
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
        fields = {name: field for name, field in linear._asdict().items() if field is not None}
        states.append(local._replace(**(fields | scored)))
    o = put_rows(q.new_zeros(*q.shape[:3], v.shape[3]), slices, outputs)
    return o, stack_states(states) if options.output_final_state else None


def with_naive_expiries(x: HybridInputs, options: HybridOptions) -> tuple[HybridInputs, dict[str, Tensor]]:
    """One sequence with expiries in place of its scores, and the fields of the final state that scores decide.

    Rows of expiry and kept_rows: kept keys of the state | keys in its ring | new tokens, from the first new query on.
    The kept keys at the end are those that have left the window, but not expired, at the last query.
    """
    if x.scores is None:
        return x, {}
    past, delay, window = x.initial_state, options.score_delay, options.window
    begin = 0 if past is None else int(past.position)
    end, first = begin + len(x.v), max(0, begin - window)
    ends, left = expiry_of_one(ExpiryInputs(x.scores, scored_state(past, options)), expiry_options(options))
    positions, carried, places = past and past.kept_positions, left.carried, kept_places(x, options)
    if carried is not None:
        ends = with_ring(carried[places:], ends, begin)
    unscored = ends.new_full((delay, ends.shape[1]), NEVER)  # the newest keys, whose scores come with later tokens
    ends = torch.cat([ends, unscored])
    ends = ends[len(ends) - (end - first) :]  # place t is that of the key at t - delay
    ends = expiring_rows(carried if carried is None else carried[:places], ends)
    x = x._replace(expiry=ends - begin, scores=None)
    if not options.output_final_state:
        return x, {}

    at = positions_of(positions, first, end, x.v)
    stay = (at >= options.anchors) & (at < end - window) & (ends >= end)
    held = torch.where(stay, at, NEVER).sort(dim=0, stable=True)
    blank = at.new_full((places, at.shape[1]), NEVER)
    position, row = (torch.cat([part, blank])[:places] for part in held)
    empty = position == NEVER
    assert left.kept_scores is not None and left.ring_scores is not None
    scored = {"kept_positions": position.masked_fill(empty, -1), "kept_scores": left.kept_scores}
    return x._replace(kept_rows=row.masked_fill(empty, -1)), scored | {"ring_scores": left.ring_scores}
