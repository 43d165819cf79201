"""The gated delta rule one position at a time."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lizard_ops.common.checks import work_dtype
from lizard_ops.common.features import expand_features, norm_of
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.steps import blank_state, over_steps, put_at, take_at
from lizard_ops.delta_attn.arguments import delta_state_shapes
from lizard_ops.delta_attn.chunk_torch import log_mass_of


def recurrent_delta_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float,
    window_offset: int,
    anchors: int,
    initial_state: AttentionState | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    padding_mask: Tensor | None,
) -> tuple[Tensor, AttentionState | None, Tensor]:
    """(o, state, log_mass) of ``recurrent_delta_attn``, whose arguments come here checked."""

    step = functools.partial(delta_step, feature_map="identity", scale=scale, offset=window_offset, anchors=anchors)

    def op(rows, lengths, state):
        blank = blank_delta_state(*rows[:4], window_offset, "identity") if state is None else state
        return over_steps(step, rows, lengths, blank)

    fills = (0.0, -math.inf)
    (o, log_mass), state = over_rows(op, (q, k, v, g, beta), fills, initial_state, cu_seqlens, padding_mask)
    return o.to(q.dtype), state if output_final_state else None, log_mass


def blank_delta_state(
    fq: Tensor, fk: Tensor, v: Tensor, g: Tensor | None, offset: int, feature_map: str
) -> AttentionState:
    """The state of a delta memory before the first token of rows [B, T, ...]."""
    work = work_dtype(v)
    shapes = delta_state_shapes(fq.shape[0], fq, fk.shape[3], v, g, offset, feature_map)
    return blank_state(v, shapes, {"s": work, "z": work, "ring_g": work, "ring_beta": work, "ring_fk": fk.dtype})


def delta_step(
    fq: Tensor,  # [B, Hq, Fp]
    fk: Tensor,  # [B, Hk, Fp]
    v: Tensor,  # [B, Hk, V]
    g: Tensor | None,  # [B, 1 or Hk]
    beta: Tensor,  # [B, Hk]
    state: AttentionState,
    *,
    feature_map: str,
    scale: float,
    offset: int,
    anchors: int,
    shared: tuple[Tensor | None, Tensor] | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """One token a row: (o [B, Hq, V], log mass [B, Hq], the fields that changed, position left to the caller).

    The key that enters the memory is the one that leaves the ring, or the new one without an offset. shared and inplace
    as for ``gated_attn.recurrent.linear_step``.
    """
    assert state.s is not None and state.z is not None
    work, key_heads = work_dtype(v), v.shape[1]
    fields: dict[str, Tensor | None] = {}
    passed = None  # log-decay since that key, [B, 1 or Hk]
    if offset:
        assert state.ring_v is not None and state.ring_fk is not None and state.ring_beta is not None
        slot = state.position % offset
        leaving_v = take_at(state.ring_v, slot) if shared is None else shared[1]
        fields["ring_v"] = put_at(state.ring_v, slot, v, inplace) if shared is None else shared[0]
        leaving_fk, leaving_beta = take_at(state.ring_fk, slot), take_at(state.ring_beta, slot)
        fields["ring_fk"] = put_at(state.ring_fk, slot, fk, inplace)
        fields["ring_beta"] = put_at(state.ring_beta, slot, beta, inplace)
        fk, v, beta = leaving_fk, leaving_v, leaving_beta
        if g is not None:
            assert state.ring_g is not None
            leaving_g = take_at(state.ring_g, slot).to(work)
            fields["ring_g"] = ring_g = put_at(state.ring_g, slot, g, inplace)
            g, passed = leaving_g, ring_g.sum(1)
    is_key = (state.position >= anchors + offset).view(-1, 1, 1)

    phi_q, phi_k = (expand_features(x.to(work), feature_map)[0] for x in (fq, fk))
    norm_q, norm_k = norm_of(phi_q), norm_of(phi_k)
    key, phi_k = (phi_k / norm_k).unsqueeze(-2), phi_k.masked_fill(~is_key, 0.0)  # [B, Hk, 1, F]
    strength = beta.to(work).unsqueeze(-1).masked_fill(~is_key, 0.0).unsqueeze(-1)  # [B, Hk, 1, 1]
    kept = torch.ones(1, 1, 1, dtype=work, device=v.device) if g is None else g.exp().unsqueeze(-1)  # [B, h, 1]
    old = state.s.to(work)
    # the rank-one pair S' = kept S + key^T (beta (v - kept key S))
    write = strength * (v.to(work).unsqueeze(-2) - kept.unsqueeze(-1) * (key @ old))  # [B, Hk, 1, V]
    if inplace:
        s = state.s.mul_(kept.unsqueeze(-1)).addcmul_(key.transpose(-1, -2), write)
        z = state.z.mul_(kept).add_(phi_k)
    else:
        s = torch.addcmul(kept.unsqueeze(-1) * old, key.transpose(-1, -2), write)
        z = kept * state.z.to(work) + phi_k
    fields |= {"s": s, "z": z}

    o = ((phi_q / norm_q).unflatten(1, (key_heads, -1)) @ s).flatten(1, 2)
    mass = (phi_q.unflatten(1, (key_heads, -1)) @ z.unsqueeze(-1)).flatten(1)  # [B, Hq]
    return o, log_mass_of(mass, passed, scale), fields
