"""The gated delta rule as its formula reads: one key after the other, one matrix a key head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common.checks import work_dtype
from lizard_ops.common.features import expand_features
from lizard_ops.common.sequences import put_rows, ring_after, sequence_slices, stack_states, state_of, with_ring
from lizard_ops.common.state import AttentionState
from lizard_ops.delta_attn.arguments import delta_arguments


def naive_delta_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    window_offset: int = 0,
    anchors: int = 0,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_log_mass: bool = False,
) -> tuple[Tensor, AttentionState | None] | tuple[Tensor, AttentionState | None, Tensor]:
    """The reference of ``chunk_delta_attn``, whose docstring says what every argument is.

    Everything but the inputs and the outputs is float32 (float64 for float64 inputs).
    """
    g, beta, scale = delta_arguments(
        q, k, v, g, beta, scale, window_offset, anchors, initial_state, cu_seqlens, padding_mask
    )
    outputs, masses, states = [], [], []
    slices = sequence_slices(q.shape[0], q.shape[1], cu_seqlens, padding_mask, q.device)
    for n, (row, at) in enumerate(slices):
        o, log_mass, state = delta_branch(
            q[row, at], k[row, at], v[row, at], None if g is None else g[row, at], beta[row, at],
            state_of(initial_state, n), feature_map="identity", scale=scale, offset=window_offset, anchors=anchors,
        )  # fmt: skip
        outputs.append(o)
        masses.append(log_mass)
        states.append(state)
    o = put_rows(q.new_zeros(*q.shape[:3], v.shape[3]), slices, outputs)
    final = stack_states(states) if output_final_state else None
    if not return_log_mass:
        return o, final
    log_mass = put_rows(q.new_full(q.shape[:3], -math.inf, dtype=work_dtype(q)), slices, masses)
    return o, final, log_mass


def delta_branch(
    fq: Tensor,  # [T, Hq, Fp]
    fk: Tensor,  # [T, Hk, Fp]
    v: Tensor,  # [T, Hk, V]
    g: Tensor | None,  # [T, 1 or Hk]
    beta: Tensor,  # [T, Hk]
    past: AttentionState | None,
    *,
    feature_map: str,
    scale: float,
    offset: int,
    anchors: int,
) -> tuple[Tensor, Tensor, AttentionState]:
    """One sequence: (o [T, Hq, V], log mass [T, Hq], state without the leading N)."""
    work, length, key_heads = work_dtype(v), len(v), v.shape[1]
    position = 0 if past is None else int(past.position)
    held = past if past is not None and offset else AttentionState(torch.tensor(position))
    fk, v = with_ring(held.ring_fk, fk, position), with_ring(held.ring_v, v, position)
    beta = with_ring(held.ring_beta, beta, position)
    gate = torch.zeros(len(v), 1, dtype=work, device=v.device) if g is None else with_ring(held.ring_g, g, position)
    new_rows, first = len(v) - length, position + length - len(v)  # row of query 0, position of row 0

    phi_q, phi_k = (expand_features(x.to(work), feature_map)[0] for x in (fq, fk))
    norm_q, norm_k = (x.square().sum(-1, keepdim=True).clamp(min=torch.finfo(work).tiny).sqrt() for x in (phi_q, phi_k))
    unit_q, unit_k = (phi_q / norm_q).unflatten(1, (key_heads, -1)), phi_k / norm_k  # [T, Hk, G, F], [J, Hk, F]
    if past is None or past.s is None or past.z is None:
        s = phi_k.new_zeros(key_heads, phi_k.shape[2], v.shape[2])
        z = s.sum(-1)
    else:
        s, z = past.s.to(work), past.z.to(work)

    outputs, masses = [], []
    for j in range(new_rows, len(v)):
        newest = j - offset
        if newest >= max(0, anchors - first):  # this key leaves the window
            kept = gate[newest].to(work).expand(key_heads).exp().unsqueeze(-1)  # [Hk, 1]
            key, strength = unit_k[newest], beta[newest].to(work).unsqueeze(-1)
            known = (key.unsqueeze(-1) * s).sum(-2)  # [Hk, V], what the memory says of this key
            s = kept.unsqueeze(-1) * (s - (strength * key).unsqueeze(-1) * known.unsqueeze(-2))
            s = s + (strength * key).unsqueeze(-1) * v[newest].to(work).unsqueeze(-2)
            z = kept * z + phi_k[newest]
        query = unit_q[j - new_rows]  # [Hk, G, F]
        outputs.append((query.unsqueeze(-1) * s.unsqueeze(1)).sum(-2).flatten(0, 1))
        passed = gate[max(0, newest + 1) : j + 1].to(work).sum(0).expand(key_heads).unsqueeze(-1)
        mass = (phi_q[j - new_rows].unflatten(0, (key_heads, -1)) * z.unsqueeze(1)).sum(-1)  # [Hk, G]
        empty = (mass < torch.finfo(work).tiny) | (passed == -math.inf)
        log_mass = torch.where(empty, 1.0, mass).log() + torch.where(empty, 0.0, passed) + math.log(scale)
        masses.append(torch.where(empty, -math.inf, log_mass).flatten())

    q_heads, end = fq.shape[1], position + length
    o = torch.stack(outputs).to(v.dtype) if outputs else v.new_zeros(0, q_heads, v.shape[2])
    log_mass = torch.stack(masses) if masses else phi_k.new_zeros(0, q_heads)
    state = AttentionState(
        torch.tensor(end, device=v.device),
        s,
        z,
        ring_v=ring_after(v, offset, end) if offset else None,
        ring_fk=ring_after(fk, offset, end) if offset else None,
        ring_g=ring_after(gate, offset, end) if offset and g is not None else None,
        ring_beta=ring_after(beta, offset, end) if offset else None,
    )
    return o, log_mass, state
