"""Sliding-window attention as its formula reads: one query at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.checks import work_dtype
from lizard_ops.common.numerics import soft_capped
from lizard_ops.common.sequences import (
    anchors_after,
    put_rows,
    ring_after,
    sequence_slices,
    stack_states,
    state_of,
    with_ring,
)
from lizard_ops.common.state import AttentionState
from lizard_ops.window_attn.arguments import window_arguments


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
    sinks, scale = window_arguments(
        q, k, v, window, anchors, sinks, sink_form, scale, initial_state, cu_seqlens, padding_mask
    )
    checks.check_softcap(softcap)
    outputs, masses, states = [], [], []
    slices = sequence_slices(q.shape[0], q.shape[1], cu_seqlens, padding_mask, q.device)
    for n, (row, at) in enumerate(slices):
        o_n, lse_n, _, state = window_branch(
            q[row, at], k[row, at], v[row, at], state_of(initial_state, n),
            window=window, anchors=anchors, sinks=sinks, sink_form=sink_form, scale=scale, softcap=softcap,
        )  # fmt: skip
        outputs.append(o_n)
        masses.append(lse_n)
        states.append(state)
    o = put_rows(q.new_zeros(*q.shape[:3], v.shape[3]), slices, outputs)
    final = stack_states(states) if output_final_state else None
    if not return_lse:
        return o, final
    return o, final, put_rows(q.new_full(q.shape[:3], -math.inf, dtype=work_dtype(q)), slices, masses)


def window_branch(
    q: Tensor,  # [T, Hq, D]
    k: Tensor,  # [T, Hk, D]
    v: Tensor,  # [T, Hk, V]
    past: AttentionState | None,
    *,
    window: int,
    anchors: int,
    sinks: Tensor | None,  # [Hq, M]
    sink_form: str,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, AttentionState]:
    """One sequence: (o [T, Hq, V], lse [T, Hq], row maximum of the scores [T, Hq], state without the leading N).

    o_i = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + c) over i - window < j <= i and j < anchors, s_ij = scale q_i.k_j, or
    softcap tanh(scale q_i.k_j / softcap).
    """
    work, (length, heads, _), group = work_dtype(q), q.shape, q.shape[1] // k.shape[1]
    old = AttentionState(torch.tensor(0)) if past is None else past
    position = int(old.position)
    anchor_k, anchor_v = (
        anchors_after(kept, new, anchors, position) for kept, new in ((old.anchor_k, k), (old.anchor_v, v))
    )
    k, v = with_ring(old.ring_k, k, position), with_ring(old.ring_v, v, position)
    first = position + length - len(k)  # position of row 0
    outputs, masses, maxima = [], [], []
    for i in range(length):
        end = i + 1 + len(k) - length  # rows up to and with the query's own key
        begin = max(0, end - window)
        far = min(anchors, first + begin)  # anchors that the window has left behind
        keys = torch.cat([anchor_k[:far], k[begin:end]]).to(work).repeat_interleave(group, 1)
        values = torch.cat([anchor_v[:far], v[begin:end]]).to(work).repeat_interleave(group, 1)
        scores = soft_capped(scale * (q[i].to(work) * keys).sum(-1), softcap)  # [j, Hq]
        top = scores.amax(0)
        if sinks is None:
            lse = scores.logsumexp(0)
        elif sink_form == "exp":
            lse = torch.cat([scores, sinks.to(work).T]).logsumexp(0)
        else:
            lse = top + ((scores - top).exp().sum(0) + sinks.to(work).sum(-1) * (-top).exp()).log()
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
    return o, lse, row_max, state
