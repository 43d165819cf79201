"""The output kernel: state, chunk, window, anchors and mix of one block of queries in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.chunk_triton_config import Shape
from lizard_ops.hybrid_attn.chunk_triton_state import States
from lizard_ops.hybrid_attn.chunk_triton_tiles import (
    LOG2E,
    Stream,
    at,
    at_anchors,
    block_count,
    features,
    first_rows,
    first_slot,
    head_lead,
    head_rows,
    load_ahead,
    load_gates,
    load_tile,
    load_tile_transposed,
    locate,
    rows,
)


class Masses(NamedTuple):
    """What the backward needs of each query beside inputs and output, [B, Hq, T], log2 units."""

    linear: Tensor  # log mass of the linear weights, the gates between the newest key and the query left out
    window: Tensor  # log-sum-exp of window, anchors and sinks
    top: Tensor  # largest score
    top_key: Tensor  # int32, its row among the keys, or -1 - a for anchor a


@triton.jit
def softmax_step(score, value, index, top, top_key, total, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
                 RELATIVE: tl.constexpr):  # fmt: skip
    """One tile of keys into the running softmax."""
    tile_top = tl.max(score, 1)
    if RELATIVE:
        tile_key = tl.max(tl.where(score == tile_top[:, None], index[None, :], -(1 << 30)), 1)
        top_key = tl.where(tile_top > top, tile_key, top_key)
    new_top = tl.maximum(top, tile_top)
    kept = tl.exp2(top - new_top)
    p = tl.exp2(score - new_top[:, None])
    total = total * kept + tl.sum(p, 1)
    acc = tl.dot(p.to(DTYPE), value, acc * kept[:, None], input_precision=PRECISION)
    return new_top, top_key, total, acc


@triton.jit
def output_kernel(
    q, k, v, fq, fk, anchor_k, anchor_v, o, s, z, gates, weight, sink, linear, window, top_out, top_key_out,
    slots, tokens, stream, score_scale, feature_scale,
    W: tl.constexpr, ANCHORS: tl.constexpr, OWN: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr,
    HS: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    FP: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, SOFTMAX: tl.constexpr,
    MERGE: tl.constexpr, RELATIVE: tl.constexpr, NORMALIZE: tl.constexpr, DTYPE: tl.constexpr,
    LINEAR_DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Output and masses of BT queries of one head.

    Blocks are aligned on linear rows, so that one never spans two chunks: query t meets linear row t - shift.
    """
    F: tl.constexpr = 2 * FP if SOFTMAX else FP
    head = tl.program_id(0) % HQ
    head_k, head_s, head_g = head // (HQ // HK), head // (HQ // HS), head // (HQ // HG)
    lead = (BT - stream.shift % BT) % BT
    n, block, batch, first, length = locate(tl.program_id(0) // HQ, stream, lead, BT)
    t = block * BT - lead  # first query of the block
    if t >= length:
        return
    key_row, linear_row, valid, behind = first_rows(n, first, stream, ANCHORS)
    i = tl.arange(0, BT)
    f, d = tl.arange(0, BF), tl.arange(0, BV)
    inside = (t + i >= 0) & (t + i < length)

    # linear branch: [inside the chunk] + [what entered it]
    r = t - stream.shift  # first linear row of the block
    acc = tl.zeros([BT, BV], tl.float32)
    mass = tl.zeros([BT], tl.float32)
    ahead = tl.zeros([BT], tl.float32)
    if r >= 0:
        slot = first_slot(n, first, stream, C) + r // C
        start = r // C * C
        whole, part = load_gates(gates, slot, slots, head_g, r - start + i, HG, C)
        ahead = load_ahead(gates, slot, slots, head_g, r - start + i, HG, C)
        b_fq = load_tile(at(fq, batch, first, head), fq.time, t, length, BT, FP, BF)
        plus, minus = features(b_fq, FP, BF, 1, SOFTMAX)
        plus, minus = plus.to(LINEAR_DTYPE), minus.to(LINEAR_DTYPE)
        entry = slot.to(tl.int64) * HS + head_s
        p_s = s + entry * F * V
        p_z = z + entry * F + f
        b_s = load_tile(p_s, V, r * 0, FP, BF, V, BV)
        acc = tl.dot(plus, b_s, acc, input_precision=PRECISION)
        mass += tl.sum(plus.to(tl.float32) * tl.load(p_z, mask=f < FP, other=0.0)[None, :], 1)
        if SOFTMAX:
            b_s = load_tile(p_s + FP * V, V, r * 0, FP, BF, V, BV)
            acc = tl.dot(minus, b_s, acc, input_precision=PRECISION)
            mass += tl.sum(minus.to(tl.float32) * tl.load(p_z + FP, mask=f < FP, other=0.0)[None, :], 1)
        entered = tl.exp2(whole + part)
        acc *= entered[:, None]
        mass *= entered
        p_fk = at(fk, batch, linear_row, head_k)
        p_v = at(v, batch, key_row + stream.start, head_k)
        for j in tl.range(0, r - start + BT, BN, num_stages=STAGES):
            row = start + j
            c = row + tl.arange(0, BN)
            b_fk = load_tile_transposed(p_fk, fk.time, row, length - stream.shift, BN, FP, BF)
            b_v = load_tile(p_v, v.time, row, length - stream.shift, BN, V, BV).to(LINEAR_DTYPE)
            key_plus, key_minus = features(b_fk, FP, BF, 0, SOFTMAX)
            a = tl.dot(plus, key_plus.to(LINEAR_DTYPE), input_precision=PRECISION)
            if SOFTMAX:
                a = tl.dot(minus, key_minus.to(LINEAR_DTYPE), a, input_precision=PRECISION)
            key_whole, key_part = load_gates(gates, slot, slots, head_g, j + tl.arange(0, BN), HG, C)
            decay = (whole[:, None] - key_whole[None, :]) + (part[:, None] - key_part[None, :])
            seen = (r + i[:, None] >= c[None, :]) & (c + stream.start >= behind)[None, :]
            a *= tl.exp2(tl.where(seen, decay, float("-inf")))
            mass += tl.sum(a, 1)
            acc = tl.dot(a.to(LINEAR_DTYPE), b_v, acc, input_precision=PRECISION)

    # window branch: keys t + prefix - W < c <= t + prefix
    b_q = load_tile(at(q, batch, first, head), q.time, t, length, BT, D, BD)
    p_k = at(k, batch, key_row, head_k)
    p_v = at(v, batch, key_row, head_k)
    own = t + stream.prefix + i
    keys = length + stream.prefix
    top = tl.full([BT], -1.0e30, tl.float32)
    top_key = tl.zeros([BT], tl.int32)
    total = tl.zeros([BT], tl.float32)
    acc_window = tl.zeros([BT, BV], tl.float32)
    for j in tl.range(0, BT + W - 1, BN, num_stages=STAGES):
        row = t + stream.prefix - W + 1 + j
        c = row + tl.arange(0, BN)
        b_k = load_tile(p_k, k.time, row, keys, BN, D, BD)
        b_v = load_tile(p_v, v.time, row, keys, BN, V, BV)
        score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * score_scale
        seen = (c[None, :] <= own[:, None]) & (c[None, :] > own[:, None] - W) & (c >= valid)[None, :]
        score = tl.where(seen, score, float("-inf"))
        top, top_key, total, acc_window = softmax_step(
            score, b_v, c, top, top_key, total, acc_window, DTYPE, PRECISION, RELATIVE
        )
    if ANCHORS > 0:
        kept = tl.minimum(ANCHORS, keys) if OWN else n * 0 + ANCHORS
        p_ak = at_anchors(anchor_k, n, batch, key_row, head_k, OWN)
        p_av = at_anchors(anchor_v, n, batch, key_row, head_k, OWN)
        BA: tl.constexpr = 16 if ANCHORS <= 16 else (32 if ANCHORS <= 32 else 64)
        for j in tl.range(0, ANCHORS, BA):
            c = j + tl.arange(0, BA)
            b_k = load_tile(p_ak, anchor_k.time, n * 0 + j, kept, BA, D, BD)
            b_v = load_tile(p_av, anchor_v.time, n * 0 + j, kept, BA, V, BV)
            score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * score_scale
            seen = anchor_seen(c, t + i, n, stream, W, ANCHORS)
            score = tl.where(seen, score, float("-inf"))
            top, top_key, total, acc_window = softmax_step(
                score, b_v, -1 - c, top, top_key, total, acc_window, DTYPE, PRECISION, RELATIVE
            )
    log_window = top + tl.log2(total)
    if sink is not None:
        b_sink = tl.load(sink + head) * LOG2E
        larger = tl.maximum(log_window, b_sink)
        log_window = larger + tl.log2(tl.exp2(log_window - larger) + tl.exp2(b_sink - larger))
    weight_window = tl.exp2(top - log_window)

    # mix
    some = (mass != 0.0) & (ahead > float("-inf"))
    log_linear = tl.where(some, tl.log2(mass), float("-inf"))
    b_weight = tl.zeros([BT], tl.float32)
    if weight is not None:
        p_weight = at(weight, batch, first + t, head) + i * weight.time
        b_weight = tl.load(p_weight, mask=inside, other=0.0).to(tl.float32)
    elif not MERGE:
        b_weight += 1.0
    if MERGE:
        share, rest = shares(log_linear, ahead, feature_scale, log_window, top, b_weight, RELATIVE)
        weight_linear = tl.where(some, share / mass, 0.0)
        weight_window *= rest
    else:
        weight_linear = tl.where(some, 1.0 / mass, 0.0) if NORMALIZE else feature_scale * tl.exp2(ahead)
        weight_window *= b_weight
    acc = acc * weight_linear[:, None] + acc_window * weight_window[:, None]

    p_o = at(o, batch, first + t, head) + (i * o.time)[:, None] + d[None, :]
    tl.store(p_o, acc.to(o.ptr.dtype.element_ty), mask=inside[:, None] & (d < V)[None, :])
    out = (batch.to(tl.int64) * HQ + head) * tokens + first + t + i
    tl.store(linear + out, log_linear, mask=inside)
    tl.store(window + out, log_window, mask=inside)
    if RELATIVE:
        tl.store(top_out + out, top, mask=inside)
        tl.store(top_key_out + out, top_key, mask=inside)


@triton.jit
def anchor_seen(c, t, n, stream, W: tl.constexpr, ANCHORS: tl.constexpr):
    """[t, c]: anchor c is one that the window of query t has left behind."""
    age = t - W
    if stream.position is not None:
        age = age + tl.load(stream.position + n)
    return (c[None, :] <= age[:, None]) & (c < ANCHORS)[None, :]


@triton.jit
def shares(log_linear, ahead, feature_scale, log_window, top, bias, RELATIVE: tl.constexpr):
    """(share of the linear branch, the rest), each with its own digits."""
    x = log_linear + ahead + tl.log2(feature_scale) + bias * LOG2E - log_window
    if RELATIVE:
        x += top
    return 1.0 / (1.0 + tl.exp2(-x)), 1.0 / (1.0 + tl.exp2(x))


def hybrid_output(
    q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, anchors: tuple[Tensor, Tensor] | None, states: States,
    gates: Tensor, weight: Tensor | None, sink: Tensor | None, scale: float, feature_scale: float, stream: Stream,
    shape: Shape,
) -> tuple[Tensor, Masses]:  # fmt: skip
    """Output [B, T, Hq, V] and masses. weight: alpha or merge bias [B, T, Hq, 1]; sink: log of the sink mass [Hq]."""
    batch, tokens, heads = q.shape[:3]
    o = torch.empty(batch, tokens, heads, shape.value, dtype=q.dtype, device=q.device)
    masses = empty_masses(q, shape)
    c = shape.config("output")
    blocks = block_count(stream, head_lead(stream.shift, c.rows), c.rows)
    if blocks and tokens:
        anchor_k, anchor_v = (k, v) if anchors is None else anchors
        output_kernel[(blocks * heads,)](
            rows(q), rows(k), rows(v), rows(fq), rows(fk), rows(anchor_k), rows(anchor_v), rows(o), states.s, states.z,
            gates, None if weight is None else head_rows(weight), sink, *masses, gates.shape[1], tokens, stream,
            scale * LOG2E.value, feature_scale, shape.window, shape.anchors, anchors is None, heads,
            shape.key_heads, shape.state_heads, gates.shape[2], shape.dim, shape.dim_block, shape.value,
            shape.value_block, shape.pre, shape.pre_block, shape.chunk, c.rows, c.columns, shape.softmax, shape.merge,
            shape.merge and shape.relative, shape.normalize, shape.compute_dtype, shape.linear_dtype, shape.precision,
            c.stages, num_warps=c.warps,
        )  # fmt: skip
    return o, masses


def empty_masses(q: Tensor, shape: Shape) -> Masses:
    """Buffers [B, Hq, T]; those that the mix has no use for are empty."""
    full = (q.shape[0], q.shape[2], q.shape[1])
    some = full if shape.merge and shape.relative else (0,)
    make = torch.empty
    return Masses(
        make(full, dtype=torch.float32, device=q.device),
        make(full, dtype=torch.float32, device=q.device),
        make(some, dtype=torch.float32, device=q.device),
        make(some, dtype=torch.int32, device=q.device),
    )
