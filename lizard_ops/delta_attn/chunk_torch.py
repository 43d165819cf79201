"""The gated delta rule in chunks of plain PyTorch: everything but the states from chunk to chunk runs at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common.checks import work_dtype
from lizard_ops.common.features import expand_features, feature_dim, norm_of
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import key_stream, layout_of, offset_fields, sliding_sum
from lizard_ops.delta_attn.triangle import unit_lower_inverse
from lizard_ops.gated_attn.chunk_torch import which_rows

CHUNK = 64  # a power of two
RESET = -1.0e6  # stands for a log-decay of -inf: its exponential is 0, and float64 sums with it stay exact enough


def chunk_delta_torch(
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
    feature_map: str = "identity",
) -> tuple[Tensor, AttentionState | None, Tensor]:
    """(o, state, log_mass) of ``chunk_delta_attn``, whose arguments come here checked; o in the work dtype.

    feature_map: "softmax" takes pre-activations in q and k.
    """

    def op(rows, lengths, state):
        *results, fields = delta_rows(
            *rows, lengths, state, feature_map=feature_map, scale=scale, offset=window_offset, anchors=anchors
        )
        position = layout_of(rows[0], state, None, lengths).end
        return results, AttentionState(position, **fields) if output_final_state else None

    fills = (0.0, -math.inf)
    (o, log_mass), state = over_rows(op, (q, k, v, g, beta), fills, initial_state, cu_seqlens, padding_mask)
    return o, state, log_mass


def delta_rows(
    fq: Tensor,  # [B, T, Hq, Fp]
    fk: Tensor,  # [B, T, Hk, Fp]
    v: Tensor,  # [B, T, Hk, V]
    g: Tensor | None,  # [B, T, 1 or Hk]
    beta: Tensor,  # [B, T, Hk]
    lengths: Tensor | None,  # [B], None: all T
    state: AttentionState | None,
    *,
    feature_map: str,
    scale: float,
    offset: int,
    anchors: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Right-padded rows: (o [B, T, Hq, V], log mass [B, T, Hq], fields of the final state).

    Row r of the key stream meets the query ``offset`` rows later, as in ``gated_attn.chunk_torch.linear_rows``. With D
    the decay between two positions of a chunk, X = (I + tril(beta D K K^T, -1))^-1 and S the state before it::

        U = X beta V - (X beta exp(G) K) S                     what each key writes
        o = tril(Q K^T D) U + exp(G) Q S
        S' = exp(G_C) S + (exp(G_C - G) K)^T U
    """
    (batch, length, q_heads, _), (key_heads, v_dim), work = fq.shape, v.shape[2:], work_dtype(v)
    prefix = offset if state is not None else 0
    layout = layout_of(fq, state, None, lengths)
    skipped = min(length, offset - prefix)  # queries without a key
    rows = length - skipped
    held = state if state is not None and offset else AttentionState(layout.position)
    fields = offset_fields(fk, v, g, state, offset, layout, beta)
    if state is None or state.s is None or state.z is None:
        s = v.new_zeros(batch, key_heads, feature_dim(fk.shape[3], feature_map), v_dim, dtype=work)
        z = s[..., 0]
    else:
        s, z = state.s.to(work), state.z.to(work)
    if rows == 0:
        nothing = v.new_zeros(batch, length, q_heads, v_dim, dtype=work)
        return nothing, torch.full_like(nothing[..., 0], -math.inf), {"s": s, "z": z} | fields

    size = min(CHUNK, 1 << (rows - 1).bit_length())
    chunks = -(-rows // size)

    def tiles(x: Tensor) -> Tensor:  # [B, rows, H, ...] -> [B, H, n, C, ...]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, chunks * size - rows))
        return x.unflatten(1, (chunks, size)).movedim(3, 1).contiguous()

    is_key, inside = which_rows(layout, lengths, rows, prefix, offset, anchors)
    there = torch.ones(1, rows, dtype=torch.bool, device=v.device) if is_key is None else is_key
    keys = expand_features(tiles(key_stream(fk, held.ring_fk, layout)[:, :rows].to(work)), feature_map)[0]
    norm_k = norm_of(keys)
    keys, norm_k = keys / norm_k, norm_k * tiles(there.to(work).unsqueeze(-1)).unsqueeze(-1)  # [B, Hk, n, C, 1]
    values = tiles(key_stream(v, held.ring_v, layout)[:, :rows].to(work))
    strength = key_stream(beta, held.ring_beta, layout)[:, :rows].to(work) * there.unsqueeze(-1)
    strength = tiles(strength).unsqueeze(-1)  # [B, Hk, n, C, 1]
    queries = F.pad(fq[:, skipped:].to(work), (0, 0, 0, 0, 0, chunks * size - rows))
    queries = queries.unflatten(2, (key_heads, -1)).unflatten(1, (chunks, size)).permute(0, 3, 1, 4, 2, 5)
    queries = expand_features(queries.contiguous().flatten(3, 4), feature_map)[0]  # [B, Hk, n, G C, F]
    norm_q = norm_of(queries)
    queries = queries / norm_q

    run = keys.new_zeros(1, 1, 1, size, dtype=torch.float64)
    passed = None
    if g is not None:
        stream = key_stream(g, held.ring_g, layout)
        gates = stream[:, :rows]
        if inside is not None:
            gates = gates.masked_fill(~inside.unsqueeze(-1), 0.0)
        run = tiles(gates).double().clamp(min=RESET).cumsum(-1)  # [B, 1 or Hk, n, C]
        if offset:
            passed = sliding_sum(stream, offset)[:, prefix + skipped :]  # [B, rows, 1 or Hk]
    decay = (run.unsqueeze(-1) - run.unsqueeze(-2)).to(work)  # [B, h, n, C, C]
    decay = decay.masked_fill(torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1), -math.inf).exp()
    from_start, to_end = run.to(work).exp().unsqueeze(-1), (run[..., -1:] - run).to(work).exp().unsqueeze(-1)
    kept = from_start[..., -1:, :].expand(-1, -1, chunks, -1, -1)  # [B, h, n, 1, 1]

    inverse = unit_lower_inverse((strength * decay * (keys @ keys.transpose(-1, -2))).tril(-1))
    written, erased = inverse @ (strength * values), inverse @ (strength * from_start * keys)
    arriving = (keys * to_end).transpose(-1, -2)  # [B, Hk, n, F, C]
    masses = (arriving @ norm_k).squeeze(-1)  # [B, Hk, n, F]
    before, sums, updates = [], [], []
    for c in range(chunks):
        before.append(s)
        sums.append(z)
        u = written[:, :, c] - erased[:, :, c] @ s
        s = kept[:, :, c] * s + arriving[:, :, c] @ u
        z = kept[:, :, c, 0] * z + masses[:, :, c]
        updates.append(u)

    group = q_heads // key_heads
    scores = (queries @ keys.transpose(-1, -2)).unflatten(3, (group, size)) * decay.unsqueeze(3)
    scores, started = scores.flatten(3, 4), from_start.unsqueeze(3).expand(-1, -1, -1, group, -1, -1).flatten(3, 4)
    o = scores @ torch.stack(updates, 2) + started * (queries @ torch.stack(before, 2))
    mass = scores @ norm_k + started * (queries @ torch.stack(sums, 2).unsqueeze(-1))
    mass = (mass * norm_q).squeeze(-1)

    def in_order(x: Tensor) -> Tensor:  # [B, Hk, n, G C, ...] -> [B, rows, Hq, ...]
        x = x.unflatten(3, (group, size)).movedim((2, 4), (1, 2))
        return x.reshape(batch, chunks * size, q_heads, *x.shape[5:])[:, :rows]

    o, mass = in_order(o), in_order(mass)
    log_mass = log_mass_of(mass, passed, scale)
    front = (0, 0, skipped, 0)
    return F.pad(o, (0, 0, *front)), F.pad(log_mass, front, value=-math.inf), {"s": s, "z": z} | fields


def log_mass_of(mass: Tensor, passed: Tensor | None, scale: float) -> Tensor:
    """log(scale mass) + passed of mass [..., Hq] and the log-decay since [..., 1 or Hk]; -inf where there is none."""
    empty = mass < torch.finfo(mass.dtype).tiny
    if passed is not None:
        passed = passed.repeat_interleave(mass.shape[-1] // passed.shape[-1], -1)
        empty = empty | (passed == -math.inf)
        passed = passed.masked_fill(empty, 0.0)
    log_mass = mass.masked_fill(empty, 1.0).log() + math.log(scale)
    return (log_mass if passed is None else log_mass + passed).masked_fill(empty, -math.inf)
