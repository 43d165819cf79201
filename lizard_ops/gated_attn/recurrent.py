"""Gated linear attention one position at a time."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.checks import linear_state_shapes, work_dtype
from lizard_ops.common.features import expand_features, feature_dim
from lizard_ops.common.numerics import tied_to
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.steps import blank_state, over_steps, put_at, take_at
from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions


def recurrent_gated_torch(inputs: GatedInputs, options: GatedOptions) -> tuple[Tensor, AttentionState | None, Tensor]:
    """(o, state, log_mass) of ``recurrent_gated_attn``, whose arguments come here checked."""

    step = functools.partial(linear_step, options=options)

    def op(inputs, lengths):
        state = inputs.initial_state
        blank = blank_linear_state(inputs, options.window_offset, "identity") if state is None else state
        return over_steps(step, inputs, lengths, blank)

    (o, log_mass), state = over_rows(op, inputs, (0.0, -math.inf))
    o = tied_to(o.to(inputs.q.dtype), inputs.q, inputs.k, inputs.v, inputs.g)
    return o, state if options.output_final_state else None, log_mass


def blank_linear_state(inputs: GatedInputs, offset: int, feature_map: str) -> AttentionState:
    """The state of the linear branch before the first token of rows [B, T, ...]."""
    fq, fk, v, g = inputs.q, inputs.k, inputs.v, inputs.g
    work, dim = work_dtype(v), fk.shape[3]
    shapes = linear_state_shapes(fq.shape[0], fq, dim, v, g, offset, feature_dim(dim, feature_map), feature_map)
    return blank_state(v, shapes, {"s": work, "z": work, "log_scale": work, "ring_g": work, "ring_fk": fk.dtype})


class Joining(NamedTuple):
    """The key that joins the sums, where keys expire: of each head its own, or none."""

    k: Tensor  # [B, Hk, Fp]
    v: Tensor  # [B, Hk, V]
    there: Tensor  # [B, Hk] bool
    decay: Tensor | None  # [B, Hk or Hq] or [B, Hk, F] log-decay since then, the new token's gate included


def linear_step(
    inputs: GatedInputs,  # of one token per row: q [B, Hq, Fp], k [B, Hk, Fp], v [B, Hk, V], g [B, Hg] or [B, Hk, F]
    state: AttentionState,
    options: GatedOptions,
    shared: tuple[Tensor | None, Tensor] | None = None,
    inplace: bool = False,
    joining: Joining | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """One token per row: (o [B, Hq, V], log mass [B, Hq], the fields that changed, position left to the caller).

    The key that joins the sums is the one that leaves the ring, or the new one without an offset, or ``joining``, with
    which rings are left to the caller too.
    shared: the ring of values with the new one in it and the value that left it, from whoever shares that ring.
    inplace: the fields are those of ``state``, overwritten.
    """
    fq, fk, v, g = inputs.q, inputs.k, inputs.v, inputs.g
    feature_map, offset, anchors = options.feature_map, options.window_offset, options.anchors
    assert state.s is not None and state.z is not None
    work, q_heads, heads = work_dtype(v), fq.shape[1], state.s.shape[1]
    fields: dict[str, Tensor | None] = {}
    passed = None  # log-decay since the joining key, [B, Hg] or [B, Hk, F]
    is_key = (state.position >= anchors + offset).view(-1, 1, 1)
    if joining is not None:
        fk, v, is_key = joining.k, joining.v, _to_heads(joining.there, heads).unsqueeze(-1)
    elif offset:
        assert state.ring_v is not None and state.ring_fk is not None
        slot = state.position % offset
        leaving_v = take_at(state.ring_v, slot) if shared is None else shared[1]
        fields["ring_v"] = put_at(state.ring_v, slot, v, inplace) if shared is None else shared[0]
        leaving_fk = take_at(state.ring_fk, slot)
        fields["ring_fk"] = put_at(state.ring_fk, slot, fk, inplace)
        fk, v = leaving_fk, leaving_v
        if g is not None:
            assert state.ring_g is not None
            leaving_g = take_at(state.ring_g, slot).to(work)
            fields["ring_g"] = ring_g = put_at(state.ring_g, slot, g, inplace)
            g, passed = leaving_g, ring_g.sum(1)

    phi_k, key_log = expand_features(fk.to(work), feature_map)
    phi_k = _to_heads(phi_k, heads)  # [B, Hs, F]
    key_log = None if key_log is None else _to_heads(key_log.unsqueeze(-1), heads)  # [B, Hs, 1]
    if joining is not None:
        phi_k, key_log = _decayed(phi_k, key_log, joining.decay)
    kept = torch.zeros(1, 1, 1, dtype=work, device=v.device) if g is None else g if g.ndim == 3 else g.unsqueeze(-1)
    kept = _to_heads(kept, heads) if kept.shape[1] > 1 else kept  # [B, 1 or Hs, 1 or F]
    log_scale = state.log_scale
    if key_log is not None and log_scale is not None:
        key_log = key_log.masked_fill(~is_key, -math.inf)
        old = log_scale.unsqueeze(-1)
        new = torch.maximum(old + kept.amax(-1, keepdim=True), key_log).detach()
        shift = new.masked_fill(new == -math.inf, 0.0)
        kept, phi_k, log_scale = kept + old - shift, phi_k * (key_log - shift).exp(), new.squeeze(-1)
    kept = kept.exp()
    phi_k = phi_k.masked_fill(~is_key, 0.0)
    values = _to_heads(v.to(work), heads)
    if inplace:
        s = state.s.mul_(kept.unsqueeze(-1)).addcmul_(phi_k.unsqueeze(-1), values.unsqueeze(-2))
        z = state.z.mul_(kept).add_(phi_k)
        log_scale = None if log_scale is None or state.log_scale is None else state.log_scale.copy_(log_scale)
    else:
        s = torch.addcmul(kept.unsqueeze(-1) * state.s.to(work), phi_k.unsqueeze(-1), values.unsqueeze(-2))
        z = kept * state.z.to(work) + phi_k
    fields |= {"s": s, "z": z, "log_scale": log_scale}

    phi_q, query_log = expand_features(fq.to(work), feature_map)
    log = phi_q.new_full((1, 1), math.log(options.scale))  # log factor of the row, broadcast over [B, Hq]
    if query_log is not None:
        log = log + query_log
    if log_scale is not None:
        log = log + _to_heads(log_scale.unsqueeze(-1), q_heads).squeeze(-1)
    if passed is not None and passed.ndim == 3:
        top = passed.detach().amax(-1, keepdim=True)
        passed = (passed - top.masked_fill(top == -math.inf, 0.0)).exp()
        phi_q = phi_q * _to_heads(passed, q_heads)
        passed = top.squeeze(-1)
    if passed is not None:
        log = log + (_to_heads(passed.unsqueeze(-1), q_heads).squeeze(-1) if passed.shape[1] > 1 else passed)
    queries = phi_q.unflatten(1, (heads, -1))  # [B, Hs, Hq / Hs, F]
    sums, mass = (queries @ s).flatten(1, 2), (queries @ z.unsqueeze(-1)).flatten(1)
    empty = (mass.abs() < torch.finfo(mass.dtype).tiny) | (log == -math.inf)
    total = mass.masked_fill(empty, 1.0)
    log_mass = (total.log() + log).masked_fill(empty, -math.inf)
    if not options.normalize:
        return sums * log.exp().expand_as(mass).unsqueeze(-1), log_mass, fields
    return (sums / total.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0), log_mass, fields


def _decayed(phi: Tensor, log: Tensor | None, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features [B, Hs, F] and their log factor [B, Hs, 1] after a decay, whose slowest channel is in the factor."""
    log = phi.new_zeros(*phi.shape[:2], 1) if log is None else log
    if decay is None:
        return phi, log
    if decay.ndim == 2:
        return phi, log + decay.unsqueeze(-1)
    slowest = decay.detach().amax(-1, keepdim=True)
    return phi * (decay - slowest.masked_fill(slowest == -math.inf, 0.0)).exp(), log + slowest


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, H, ...] with every head as often as ``heads`` needs it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
