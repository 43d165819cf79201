"""Gated linear attention as its formula reads: one query at a time, every key weighed anew."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common.checks import state_heads, work_dtype
from lizard_ops.common.features import expand_features
from lizard_ops.common.sequences import (
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
from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions, gated_arguments


def naive_gated_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = True,
    window_offset: int = 0,
    anchors: int = 0,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_log_mass: bool = False,
) -> tuple[Tensor, AttentionState | None] | tuple[Tensor, AttentionState | None, Tensor]:
    """The reference of ``chunk_gated_attn``, whose docstring says what every argument is. Quadratic in time.

    Sums and exponents are float32 (float64 for float64 inputs); the weights, at most 1, meet the values in the
    dtype of q, as in plain PyTorch attention.
    """
    inputs, options = gated_arguments(
        GatedInputs(
            q=q, k=k, v=v, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask
        ),
        GatedOptions(
            scale=scale, normalize=normalize, window_offset=window_offset, anchors=anchors,
            output_final_state=output_final_state,
        ),
    )  # fmt: skip
    o, state, log_mass = naive_gated(inputs, options)
    return (o, state, log_mass) if return_log_mass else (o, state)


def naive_gated(inputs: GatedInputs, options: GatedOptions) -> tuple[Tensor, AttentionState | None, Tensor]:
    """(o, state, log mass) of checked arguments."""
    q, v = inputs.q, inputs.v
    heads = state_heads(q, v, inputs.g)
    outputs, masses, states = [], [], []
    slices = sequence_slices(inputs)
    for n, (row, at) in enumerate(slices):
        o, log_mass, state = linear_branch(one_sequence(inputs, n, row, at), heads, options)
        outputs.append(o)
        masses.append(log_mass)
        states.append(state)
    o = put_rows(q.new_zeros(*q.shape[:3], v.shape[3]), slices, outputs)
    log_mass = put_rows(q.new_full(q.shape[:3], -math.inf, dtype=work_dtype(q)), slices, masses)
    return o, stack_states(states) if options.output_final_state else None, log_mass


def linear_branch(
    inputs: GatedInputs,  # of one sequence: q [T, Hq, Fp], k [T, Hk, Fp], v [T, Hk, V], g [T, Hg] or [T, Hk, F]
    heads: int,  # Hs, of the sums
    options: GatedOptions,
) -> tuple[Tensor, Tensor, AttentionState]:
    """One sequence: (o [T, Hq, V], log mass [T, Hq], state without the leading N).

    o_i = sum_j a_ij v_j / sum_j a_ij over anchors <= j <= i - offset, with a_ij = scale phi(q_i).phi(k_j) exp(D_ij)
    and D_ij the sum of g over j + 1..i; log mass_i = log sum_j a_ij. With an expiry the keys are those of
    expiry_j <= i instead, rows kept keys | ring | new tokens, and the sums are decayed up to the newest token.
    """
    fq, fk, v, g, past = inputs.q, inputs.k, inputs.v, inputs.g, inputs.initial_state
    feature_map, offset, anchors = options.feature_map, options.window_offset, options.anchors
    work, (length, q_heads, _), group = work_dtype(v), fq.shape, fq.shape[1] // v.shape[1]
    position = 0 if past is None else int(past.position)
    ring = past if past is not None and offset else AttentionState(torch.tensor(position))
    fk, v = with_ring(ring.ring_fk, fk, position), with_ring(ring.ring_v, v, position)
    new_rows, first = len(v) - length, position + length - len(v)  # row of query 0, position of row 0
    gate = torch.zeros(len(v), 1, dtype=work, device=v.device) if g is None else with_ring(ring.ring_g, g, position)

    expiry, places = inputs.expiry, 0  # rows of kept keys
    if expiry is not None:
        at = positions_of(None if past is None else past.kept_positions, first, position + length, v)  # [P + J, Hk]
        places = len(at) - len(v)
        fk, v = (expiring_rows(x, y) for x, y in ((past and past.kept_fk, fk), (past and past.kept_v, v)))

    # every tensor with the query heads: [J, Hq, ...]
    phi_q, query_log = rounded_features(fq, feature_map, work)
    phi_k, key_log = (x.repeat_interleave(group, 1) for x in rounded_features(fk, feature_map, work))
    values = v.to(work).repeat_interleave(group, 1)
    gate_q = (gate if gate.ndim == 3 else gate.unsqueeze(-1)).to(work)
    gate_q = gate_q.repeat_interleave(q_heads // gate_q.shape[1], 1)  # [J, Hq, 1 or F]
    s0, z0, log0 = carried_sums(past, heads, q_heads, phi_q, values, feature_map)
    s, z, log_s = s0, z0, log0 if expiry is None or past is not None else torch.full_like(log0, -math.inf)

    decay = gate_q[:0]  # [j, Hq, 1 or F] of each key so far, up to now
    since = torch.zeros_like(gate_q[0]) if len(gate_q) else gate_q.sum(0)  # the same of the carried sums
    of_kept = carried_decays(past, places, gate_q)  # and of the kept keys, which the ring's gates are part of already
    outputs, masses = [], []
    for j in range(len(gate_q)):
        decay = torch.cat([decay + gate_q[j], torch.zeros_like(gate_q[:1])])
        since = since + gate_q[j] if expiry is None or j >= new_rows else since
        if j < new_rows:
            continue
        of_kept = of_kept + gate_q[j]
        oldest, newest = max(0, anchors - first), j - offset
        if newest >= oldest and expiry is None:  # this key leaves the window and joins the sums
            log_new = torch.maximum(log_s + gate_q[newest].amax(-1), key_log[newest]).detach()
            kept = (log_s.unsqueeze(-1) + gate_q[newest] - log_new.unsqueeze(-1)).exp()
            key = phi_k[newest] * (key_log[newest] - log_new).exp().unsqueeze(-1)
            s = kept.unsqueeze(-1) * s + key.unsqueeze(-1) * values[newest].unsqueeze(-2)
            z, log_s = kept * z + key, log_new

        keys: slice | Tensor = slice(oldest, max(oldest, newest + 1))
        if expiry is not None:
            expired = (expiry[: places + j + 1] <= j - new_rows) & (at[: places + j + 1] >= anchors)
            keys = expired.any(1).nonzero().squeeze(1)
            expired, joins = (x[keys].repeat_interleave(group, 1) for x in (expired, expiry == j - new_rows))  # [j, Hq]
        log_near, log_far = torch.cat([of_kept, decay])[keys] + key_log[keys].unsqueeze(-1), since + log0.unsqueeze(-1)
        if expiry is not None:
            log_near = log_near.masked_fill(~expired.unsqueeze(-1), -math.inf)
            log_join = log_near.masked_fill(~joins.unsqueeze(-1), -math.inf)  # of those that join the sums
            log_old, log_s = log_s.unsqueeze(-1) + gate_q[j], (log_s + gate_q[j].amax(-1)).detach()
            log_s = torch.cat([log_s.unsqueeze(0), log_join.detach().amax(-1)]).amax(0)
            shift = torch.where(log_s > -math.inf, log_s, 0.0).unsqueeze(-1)
            joining = phi_k[keys] * (log_join - shift).exp()  # [j, Hq, F]
            s = (log_old - shift).exp().unsqueeze(-1) * s + (joining.unsqueeze(-1) * values[keys].unsqueeze(-2)).sum(0)
            z = (log_old - shift).exp() * z + joining.sum(0)
        top = torch.cat([log_near, log_far.unsqueeze(0)]).amax((0, 2)).detach()
        top = torch.where(top > -math.inf, top, 0.0)  # [Hq], the row shift
        query = phi_q[j - new_rows]
        a = (query * phi_k[keys] * (log_near - top.unsqueeze(-1)).exp()).sum(-1)  # [j, Hq]
        far = query * (log_far - top.unsqueeze(-1)).exp()  # [Hq, F]
        mass = a.sum(0) + (far * z0).sum(-1)
        empty = mass.abs() < torch.finfo(work).tiny  # no key, or none that this dtype can still weigh
        total = torch.where(empty, 1.0, mass)
        if options.normalize:
            weights, far = a / total, far / total.unsqueeze(-1)
        else:
            factor = options.scale * (top + query_log[j - new_rows]).exp()
            weights, far = a * factor, far * factor.unsqueeze(-1)
        weights = weights.to(v.dtype).to(work)
        o = (weights.unsqueeze(-1) * values[keys]).sum(0) + (far.unsqueeze(-1) * s0).sum(-2)
        log_mass = total.log() + top + query_log[j - new_rows] + math.log(options.scale)
        outputs.append(torch.where(empty.unsqueeze(-1), 0.0, o) if options.normalize else o)
        masses.append(torch.where(empty, -math.inf, log_mass))

    o = torch.stack(outputs).to(v.dtype) if outputs else v.new_zeros(0, q_heads, v.shape[2])
    log_mass = torch.stack(masses) if masses else values.new_zeros(0, q_heads)
    one = slice(None, None, q_heads // heads)
    end = position + length
    state = AttentionState(
        position=torch.tensor(end, device=v.device),
        s=s[one],
        z=z[one],
        log_scale=log_s[one] if feature_map == "exp" or expiry is not None else None,
        ring_v=ring_after(v, offset, end) if offset else None,
        ring_fk=ring_after(fk, offset, end) if offset else None,
        ring_g=ring_after(gate, offset, end) if offset and g is not None else None,
    )
    if inputs.kept_rows is not None:
        state = state._replace(kept_fk=rows_by_head(fk, inputs.kept_rows))
        if g is not None:
            decay = torch.cat([of_kept, decay])[:, one]  # [P + J, Hs, 1 or F]
            kept_g = rows_by_head(decay if g.ndim == 3 else decay.squeeze(-1), inputs.kept_rows)
            state = state._replace(kept_g=kept_g)
    return o, log_mass, state


def rounded_features(x: Tensor, feature_map: str, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features as plain PyTorch holds them, in the dtype of x, and their log offset [T, H]."""
    phi, log_offset = expand_features(x, feature_map)
    log_offset = torch.zeros(x.shape[:2], dtype=work, device=x.device) if log_offset is None else log_offset.to(work)
    return phi.to(x.dtype).to(work), log_offset


def carried_decays(past: AttentionState | None, places: int, gate: Tensor) -> Tensor:
    """[P, Hq, 1 or F]: the log decay of each kept key up to the newest token of the state; gate [J, Hq, 1 or F]."""
    if past is None or past.kept_g is None:
        return gate.new_zeros(places, *gate.shape[1:])
    decay = past.kept_g if past.kept_g.ndim == 3 else past.kept_g.unsqueeze(-1)
    return decay.to(gate.dtype).repeat_interleave(gate.shape[1] // decay.shape[1], 1)


def carried_sums(
    past: AttentionState | None, heads: int, q_heads: int, phi: Tensor, values: Tensor, feature_map: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(s [Hq, F, V], z [Hq, F], log scale [Hq]) to start from."""
    if past is None or past.s is None or past.z is None:
        s = phi.new_zeros(q_heads, phi.shape[2], values.shape[2])
        return s, s.sum(-1), phi.new_full((q_heads,), -math.inf if feature_map == "exp" else 0.0)
    log_scale = past.z.new_zeros(heads) if past.log_scale is None else past.log_scale
    group = q_heads // heads
    s, z, log_scale = (x.to(phi.dtype).repeat_interleave(group, 0) for x in (past.s, past.z, log_scale))
    return s, z, log_scale.detach()
