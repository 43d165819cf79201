"""Gated linear attention in plain PyTorch: offsets, gates and normaliser around the tiles of a chunk."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common.checks import state_heads, work_dtype
from lizard_ops.common.features import expand_features, feature_dim
from lizard_ops.common.numerics import tied_to
from lizard_ops.common.rows import over_rows
from lizard_ops.common.sizes import smaller
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import Layout, key_stream, layout_of, offset_fields, sliding_sum
from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions
from lizard_ops.gated_attn.chunk_torch_channels import attend_channel_logs, channel_factors, key_factors
from lizard_ops.gated_attn.chunk_torch_tiles import Attended, Sums, attend_channel_gate, attend_head_gate, finite
from lizard_ops.gated_attn.expiring import in_order_of_expiry

HEAD_GATE_CHUNK = 64
CHANNEL_GATE_CHUNK = 16


def chunk_gated_torch(inputs: GatedInputs, options: GatedOptions) -> tuple[Tensor, AttentionState | None, Tensor]:
    """(o, state, log_mass) of ``chunk_gated_attn``, whose arguments come here checked."""
    o, state, log_mass = linear_torch(inputs, options)
    return o.to(inputs.q.dtype), state, log_mass


def linear_torch(inputs: GatedInputs, options: GatedOptions) -> tuple[Tensor, AttentionState | None, Tensor]:
    """The same for features that a map has yet to give, and o not yet rounded to the dtype of the inputs."""

    def op(inputs, lengths):
        *results, fields = linear_rows(inputs, lengths, options)
        position = layout_of(inputs.q, inputs.initial_state, None, lengths).end
        return results, AttentionState(position, **fields) if options.output_final_state else None

    (o, log_mass), state = over_rows(op, inputs, (0.0, -math.inf), options.window_offset)
    return o, state, log_mass


def linear_rows(
    inputs: GatedInputs,  # q [B, T, Hq, Fp], k [B, T, Hk, Fp], v [B, T, Hk, V], g [B, T, Hg] or [B, T, Hk, F]
    lengths: Tensor | None,  # [B], None: all T
    options: GatedOptions,
) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Right-padded rows: (o [B, T, Hq, V], log mass [B, T, Hq], fields of the final state).

    Row t of the key stream meets the query ``offset`` rows later: what the gates between them take is a factor of
    the whole row, which leaves a normalised output as it is (a gate per channel: a factor of each query feature).
    With an expiry keys come in its order, and each meets the query of its own row after a decay of its own.
    """
    entering, layout = None, layout_of(inputs.q, inputs.initial_state, None, lengths)
    rings = offset_fields(inputs.k, inputs.v, inputs.g, inputs.initial_state, options.window_offset, layout)
    if inputs.expiry is not None:
        inputs, entering = in_order_of_expiry(inputs, lengths, options.anchors)
        options, rings = options._replace(window_offset=0, anchors=0), rings | entering.fields
    fq, fk, v, g, state = inputs.q, inputs.k, inputs.v, inputs.g, inputs.initial_state
    feature_map, offset, anchors = options.feature_map, options.window_offset, options.anchors
    batch, length, q_heads, _ = fq.shape
    (key_heads, v_dim), work, channels = v.shape[2:], work_dtype(v), g is not None and g.ndim == 4
    prefix = offset if state is not None else 0
    skipped = smaller(length, offset - prefix)  # queries without a key
    rows = length - skipped
    held = state if state is not None and offset else AttentionState(layout.position)
    gates = None if g is None else key_stream(g, held.ring_g, layout)
    start = _start(state, key_heads, work)
    if rows == 0:
        logs = feature_map == "exp" or entering is not None
        final = start or _no_sums(fk, v, state_heads(fq, v, g), feature_map, logs)
        final = final._replace(s=tied_to(final.s, fk, v, g))
        nothing = tied_to(v.new_zeros(batch, length, q_heads, v_dim, dtype=work), fq, fk, v, g, final.s)
        fields = _linear_fields(final) | rings
        return nothing, torch.full_like(nothing[..., 0], -math.inf), fields

    size = smaller(rows, options.chunk_size or (CHANNEL_GATE_CHUNK if channels else HEAD_GATE_CHUNK))
    chunks = -(-rows // size)

    def tiles(x: Tensor, fill: float = 0.0) -> Tensor:  # [B, rows, H, ...] -> [B, H, n, C, ...]
        padding = (0, 0) * (x.ndim - 2) + (0, chunks * size - rows)
        return F.pad(x, padding, value=fill).unflatten(1, (-1, size)).movedim(3, 1).contiguous()

    def head_tiles(x: Tensor, fill: float = 0.0) -> Tensor:  # [B, rows, Hg] -> [B, h, n, y, C]
        heads = x.shape[2] // key_heads if x.shape[2] > 1 else 1
        return tiles(x, fill).unflatten(1, (-1, heads)).movedim(2, 3)

    is_key, inside = which_rows(layout, lengths, rows, prefix, offset, anchors)
    row_values = F.pad(key_stream(v, held.ring_v, layout)[:, :rows].to(work), (0, 1), value=1.0)
    row_gates = None if gates is None else gates[:, :rows]
    if is_key is not None:
        row_values = row_values.masked_fill(~is_key[:, :, None, None], 0.0)
    if inside is not None and row_gates is not None:
        row_gates = row_gates.masked_fill(~inside.view(*inside.shape, *[1] * (row_gates.ndim - 2)), 0.0)

    query_rows = F.pad(fq[:, skipped:].to(work), (0, 0, 0, 0, 0, chunks * size - rows))
    query_rows = query_rows.unflatten(2, (key_heads, -1)).unflatten(1, (-1, size)).permute(0, 3, 1, 4, 2, 5)
    query_rows = query_rows.contiguous()  # [B, Hk, n, G, C, Fp]
    key_rows = tiles(key_stream(fk, held.ring_fk, layout)[:, :rows].to(work))
    there = torch.ones(1, rows, dtype=torch.bool, device=v.device) if is_key is None else is_key
    between = None  # log-decay from a row's key to its query, [B, rows, h] or [B, rows, Hk, F]
    if gates is not None and offset:
        between = sliding_sum(gates, offset)[:, prefix + skipped :]
    passed = None  # what is a factor of the whole row of it, [B, h, n, y, C]
    if entering is not None and entering.left is not None:
        passed = head_tiles(entering.left)

    query_log = None
    if channels and row_gates is not None and (feature_map == "exp" or entering is not None):
        q = channel_factors(query_rows, feature_map).plus(None if between is None else tiles(between).unsqueeze(3))
        decayed = None if entering is None else tiles(entering.decayed, -math.inf)
        k, key_log = key_factors(key_rows, feature_map, decayed, ~tiles(there.unsqueeze(2), False))
        attended = attend_channel_logs(q, k, tiles(row_values), tiles(row_gates), key_log, start)
    else:
        queries, query_log = expand_features(query_rows, feature_map)
        keys, key_top = expand_features(key_rows, feature_map)
        if between is not None and channels:
            rest = tiles(between)
            passed = rest.detach().amax(-1)
            queries = queries * (rest - finite(passed).unsqueeze(-1)).exp().unsqueeze(3)
            passed = passed.unsqueeze(3)
        elif between is not None:
            passed = head_tiles(between)
        if channels and row_gates is not None:
            attended = attend_channel_gate(queries, keys, tiles(row_values), tiles(row_gates), start)
        else:
            head_gates = None if row_gates is None else head_tiles(row_gates)
            log = None
            if key_top is not None:
                log = key_top.double().masked_fill(~tiles(there.unsqueeze(2), False), -math.inf).unsqueeze(3)
            if entering is not None:
                own = head_tiles(entering.decayed, -math.inf)
                log = own if log is None else log + own
            absorbed = options.gate_form == "absorbed"
            attended = attend_head_gate(queries, keys, tiles(row_values), head_gates, log, start, absorbed)
    weighed = _weighed(attended, query_log, passed, options.scale, options.normalize)
    o, log_mass = (x.to(work) for x in weighed)

    def in_order(x: Tensor, fill: float) -> Tensor:  # [B, Hk, n, G, C, ...] -> [B, T, Hq, ...]
        x = x.movedim((2, 4), (1, 2)).reshape(batch, chunks * size, q_heads, *x.shape[5:])[:, :rows]
        return F.pad(x, (0, 0) * (x.ndim - 2) + (skipped, 0), value=fill)

    final = attended.final
    if entering is not None and entering.left is not None:
        final = _without_lost(final, entering.left[:, -1])
    return in_order(o, 0.0), in_order(log_mass, -math.inf), _linear_fields(final) | rings


def which_rows(
    layout: Layout, lengths: Tensor | None, rows: int, prefix: int, offset: int, anchors: int
) -> tuple[Tensor | None, Tensor | None]:
    """[B, rows] which key rows count, and which reach the final sums at all (their gates count); None for all."""
    row, inside, is_key = torch.arange(rows, device=layout.start.device), None, None
    if lengths is not None:
        inside = is_key = row < (prefix + lengths - offset).unsqueeze(1)
    if anchors or prefix:
        late = (layout.position - prefix).unsqueeze(1) + row >= anchors
        is_key = late if inside is None else late & inside
    return is_key, inside


def _weighed(
    attended: Attended, query_log: Tensor | None, passed: Tensor | None, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """(o [B, Hk, n, G, C, V], log mass [B, Hk, n, G, C]) from sums and the log factors of their rows."""
    sums, mass = attended.values[..., :-1], attended.values[..., -1]
    log = mass.new_zeros(()) + math.log(scale)
    for part in (attended.shift, query_log, passed):
        log = log if part is None else log + part
    empty = (mass.abs() < torch.finfo(mass.dtype).tiny) | (log == -math.inf)
    total = mass.masked_fill(empty, 1.0)
    log_mass = (total.log() + log).to(mass.dtype).masked_fill(empty, -math.inf)
    if not normalize:
        return sums * log.exp().to(mass.dtype).expand_as(mass).unsqueeze(-1), log_mass
    return (sums / total.unsqueeze(-1)).masked_fill(empty.unsqueeze(-1), 0.0), log_mass


def _start(state: AttentionState | None, key_heads: int, work: torch.dtype) -> Sums | None:
    """The carried sums, their values and mass side by side."""
    if state is None or state.s is None or state.z is None:
        return None
    s = torch.cat([state.s, state.z.unsqueeze(-1)], -1).to(work).unflatten(1, (key_heads, -1))
    log_scale = state.log_scale
    return Sums(s, None if log_scale is None else log_scale.detach().double().unflatten(1, (key_heads, -1)))


def _no_sums(fk: Tensor, v: Tensor, heads: int, feature_map: str, logs: bool) -> Sums:
    """The sums of no key."""
    shape = (fk.shape[0], v.shape[2], heads // v.shape[2])
    s = v.new_zeros(*shape, feature_dim(fk.shape[3], feature_map), v.shape[3] + 1, dtype=work_dtype(v))
    return Sums(s, s.new_full(shape, -math.inf) if logs else None)


def _without_lost(final: Sums, left: Tensor) -> Sums:
    """Sums after a reset that no key of them outlived are those of no key; left [B, h] of the last query."""
    assert final.log_scale is not None
    lost = (left == -math.inf).unflatten(1, (final.log_scale.shape[1], -1))
    return Sums(final.s.masked_fill(lost[..., None, None], 0.0), final.log_scale.masked_fill(lost, -math.inf))


def _linear_fields(final: Sums) -> dict[str, Tensor | None]:
    """The linear sums as fields of a state."""
    s = final.s.flatten(1, 2)
    log_scale = None if final.log_scale is None else final.log_scale.flatten(1, 2).to(s.dtype)
    return {"s": s[..., :-1], "z": s[..., -1], "log_scale": log_scale}
