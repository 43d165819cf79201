"""Sliding-window attention as its formula reads: one query at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common.checks import work_dtype
from lizard_ops.common.numerics import soft_capped
from lizard_ops.common.sequences import (
    anchors_after,
    expiring_rows,
    one_sequence,
    positions_of,
    put_rows,
    ring_after,
    rows_by_head,
    sequence_slices,
    stack_states,
    with_ring,
)
from lizard_ops.common.state import AttentionState
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions, window_arguments


def naive_window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    anchors: int = 0,
    sinks: Tensor | None = None,
    sink_form: str = "exp",
    scale: float | None = None,
    softcap: float | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, AttentionState | None] | tuple[Tensor, AttentionState | None, Tensor]:
    """The reference of ``window_attn``, whose docstring says what every argument is.

    Sums and exponents are float32 (float64 for float64 inputs); the normalised weights meet the values in the
    dtype of q, as in plain PyTorch attention.
    """
    inputs, options = window_arguments(
        WindowInputs(
            q=q, k=k, v=v, sinks=sinks, initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask
        ),
        WindowOptions(
            window=window, anchors=anchors, sink_form=sink_form, scale=scale, softcap=softcap,
            output_final_state=output_final_state,
        ),
    )  # fmt: skip
    o, state, lse, _ = naive_window(inputs, options)
    return (o, state, lse) if return_lse else (o, state)


def naive_window(inputs: WindowInputs, options: WindowOptions) -> tuple[Tensor, AttentionState | None, Tensor, Tensor]:
    """(o, state, lse, row maximum) of checked arguments."""
    q, v = inputs.q, inputs.v
    outputs, masses, maxima, states = [], [], [], []
    slices = sequence_slices(inputs)
    for n, (row, at) in enumerate(slices):
        o, lse, row_max, state = window_branch(one_sequence(inputs, n, row, at), options)
        outputs.append(o)
        masses.append(lse)
        maxima.append(row_max)
        states.append(state)
    o = put_rows(q.new_zeros(*q.shape[:3], v.shape[3]), slices, outputs)
    blank = q.new_full(q.shape[:3], -math.inf, dtype=work_dtype(q))
    lse, row_max = put_rows(blank, slices, masses), put_rows(blank, slices, maxima)
    return o, stack_states(states) if options.output_final_state else None, lse, row_max


def window_branch(
    inputs: WindowInputs,  # of one sequence: q [T, Hq, D], k [T, Hk, D], v [T, Hk, V], sinks [Hq, M]
    options: WindowOptions,
) -> tuple[Tensor, Tensor, Tensor, AttentionState]:
    """One sequence: (o [T, Hq, V], lse [T, Hq], row maximum of the scores [T, Hq], state without the leading N).

    o_i = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + c) over i - window < j <= i and j < anchors, s_ij = scale q_i.k_j, or
    softcap tanh(scale q_i.k_j / softcap); with an expiry over j <= i < expiry_j too, kept keys of the state among them,
    which the maximum leaves out.
    """
    q, k, v, sinks, past = inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.initial_state
    window, anchors = options.window, options.anchors
    work, (length, heads, _), group = work_dtype(q), q.shape, q.shape[1] // k.shape[1]
    old = AttentionState(torch.tensor(0)) if past is None else past
    position = int(old.position)
    anchor_k, anchor_v = (
        anchors_after(kept, new, anchors, position) for kept, new in ((old.anchor_k, k), (old.anchor_v, v))
    )
    k, v = with_ring(old.ring_k, k, position), with_ring(old.ring_v, v, position)
    first = position + length - len(k)  # position of row 0
    if inputs.expiry is not None:
        far = min(anchors, first)  # anchors that are no longer among the rows
        at = positions_of(old.kept_positions, first, position + length, k)  # [J, Hk]
        at = torch.cat([torch.arange(far, device=k.device).unsqueeze(1).expand(-1, at.shape[1]), at])
        ends = torch.cat([inputs.expiry.new_full((far, at.shape[1]), -1), inputs.expiry])
        all_k = torch.cat([anchor_k[:far], expiring_rows(old.kept_k, k)])
        all_v = torch.cat([anchor_v[:far], expiring_rows(old.kept_v, v)])
    outputs, masses, maxima = [], [], []
    for i in range(length):
        end = i + 1 + len(k) - length  # rows up to and with the query's own key
        begin = max(0, end - window)
        far = min(anchors, first + begin)  # anchors that the window has left behind
        keys, values, near = torch.cat([anchor_k[:far], k[begin:end]]), torch.cat([anchor_v[:far], v[begin:end]]), None
        if inputs.expiry is not None:
            come = (at >= 0) & (at <= position + i)
            seen = come & ((at > position + i - window) | (at < anchors))
            alive = seen | (come & (ends > i))  # [J, Hk]
            rows = alive.any(1).nonzero().squeeze(1)
            keys, values = all_k[rows], all_v[rows]
            near, alive = (x[rows].repeat_interleave(group, 1) for x in (seen, alive))
        keys, values = (x.to(work).repeat_interleave(group, 1) for x in (keys, values))
        scores = soft_capped(options.scale * (q[i].to(work) * keys).sum(-1), options.softcap)  # [j, Hq]
        if near is not None:
            scores = scores.masked_fill(~alive, -math.inf)
        largest = scores.amax(0)
        top = largest if near is None else scores.masked_fill(~near, -math.inf).amax(0)
        if sinks is None:
            lse = scores.logsumexp(0)
        elif options.sink_form == "exp":
            lse = torch.cat([scores, sinks.to(work).T]).logsumexp(0)
        else:
            lse = largest + ((scores - largest).exp().sum(0) + sinks.to(work).sum(-1) * (-largest).exp()).log()
        weights = (scores - lse).exp().to(v.dtype).to(work)
        outputs.append((weights.unsqueeze(-1) * values).sum(0))
        masses.append(lse)
        maxima.append(top)
    o = torch.stack(outputs).to(v.dtype) if outputs else v.new_zeros(0, heads, v.shape[2])
    lse, row_max = (torch.stack(x) if x else v.new_zeros(0, heads, dtype=work) for x in (masses, maxima))
    end = position + length
    state = AttentionState(
        torch.tensor(end, device=v.device),
        ring_k=ring_after(k, window, end),
        ring_v=ring_after(v, window, end),
        anchor_k=anchor_k if anchors else None,
        anchor_v=anchor_v if anchors else None,
    )
    if inputs.kept_rows is not None:
        state = state._replace(
            kept_k=rows_by_head(expiring_rows(old.kept_k, k), inputs.kept_rows),
            kept_v=rows_by_head(expiring_rows(old.kept_v, v), inputs.kept_rows),
        )
    return o, lse, row_max, state
