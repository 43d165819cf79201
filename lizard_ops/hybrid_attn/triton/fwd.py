"""The output kernel: state, chunk, window, anchors and mix of one block of queries in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.triton.call import FusedInputs, FusedOptions
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.kept import Kept, kept_keys, kept_list, largest, outlives
from lizard_ops.hybrid_attn.triton.state import States
from lizard_ops.tiles.decays import decay_between, decay_since_start, load_ahead, load_gates, load_key_gates
from lizard_ops.tiles.features import exponential_log2, features
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import Stream, first_rows, first_slot, head_lead, locate_in_stream, stream_blocks
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned
from lizard_ops.tiles.softcap import cap_of, capped, units_of
from lizard_ops.tiles.strided import (
    at,
    at_anchors,
    head_step,
    load_rows,
    load_stack,
    load_tile,
    strided,
    strided_heads,
    time_step,
)
from lizard_ops.window_attn.triton.fwd import scaled_above

TINY = tl.constexpr(1.1754943508222875e-38)  # a mass below is none: float32 keeps too few digits of it


class Masses(NamedTuple):
    """What the backward needs of each query beside inputs and output, [B, Hq, T], log2 units."""

    linear: Tensor  # log mass of the linear weights, the gates between the newest key and the query left out
    window: Tensor  # log-sum-exp of window, anchors and sinks
    spread: Tensor  # that less the largest score, which would leave the difference few digits
    top_key: Tensor  # int32, its row among the keys, or -1 - a for anchor a


@triton.jit
def softmax_step(
    score, value, index, top, top_key, total, acc, scale, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    RELATIVE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax of scale * score; top is that of the bare scores."""
    tile_top = tl.max(score, 1)
    if RELATIVE:
        tile_key = tl.max(tl.where(score == tile_top[:, None], index[None, :], -(1 << 30)), 1)
        top_key = tl.where(tile_top > top, tile_key, top_key)
    new_top = tl.maximum(top, tile_top)
    kept = tl.exp2((top - new_top) * scale)
    p = tl.exp2(scaled_above(score, new_top, scale, PRECISION))
    total = total * kept + tl.sum(p, 1)
    if FIRST:
        acc = tl.dot(p.to(DTYPE), value, input_precision=PRECISION)
    else:
        acc = tl.dot(p.to(DTYPE), value, acc * kept[:, None], input_precision=PRECISION)
    return new_top, top_key, total, acc


@triton.jit
def anchor_step(
    b_q, p_k, p_v, k_time, v_time, A0: tl.constexpr, t, kept, n, stream, top, top_key, total, acc, scale, cap,
    W: tl.constexpr, ANCHORS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, RELATIVE: tl.constexpr,
):  # fmt: skip
    """Sixteen anchors into the running softmax, which the first of them start."""
    c = A0 + tl.arange(0, 16)
    b_k = load_tile(p_k, k_time, n * 0 + A0, kept, 16, D, BD)
    b_v = load_tile(p_v, v_time, n * 0 + A0, kept, 16, V, BV)
    score = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
    score = tl.where(anchor_seen(c, t, n, stream, W, ANCHORS), score, float("-inf"))
    return softmax_step(
        score, b_v, -1 - c, top, top_key, total, acc, scale, DTYPE, PRECISION, RELATIVE, A0 == 0
    )  # fmt: skip


@triton.jit
def output_kernel(
    q, k, v, fq, phi, anchor_k, anchor_v, o, s, z, gates, weight, sink, linear, window, spread_out, top_key_out,
    slots, tokens, stream, score_scale, cap, feature_scale, linear_v, living,
    W: tl.constexpr, ANCHORS: tl.constexpr, OWN: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr,
    HS: tl.constexpr, HG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    FP: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, GH: tl.constexpr, BN: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, KEYED: tl.constexpr, MERGE: tl.constexpr, RELATIVE: tl.constexpr,
    NORMALIZE: tl.constexpr, DTYPE: tl.constexpr, LINEAR_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Output and masses of BT queries of GH heads that share their keys, stacked as rows of one tile.

    Blocks are aligned on linear rows, so that one never spans two chunks: query t meets linear row t - shift. linear_v:
    the values of the linear rows, if not those of the keys. living: the keys that outlive their window.
    """
    F: tl.constexpr = 2 * FP if MAP != "identity" else FP
    BM: tl.constexpr = BT * GH
    head = tl.program_id(0) % (HQ // GH) * GH
    head_k, head_s, head_g = head // (HQ // HK), head // (HQ // HS), head // (HQ // HG)
    lead = (BT - stream.shift % BT) % BT
    n, block, batch, first, length = locate_in_stream(tl.program_id(0) // (HQ // GH), stream, lead, BT)
    t = block * BT - lead  # first query of the block
    if t >= length:
        return
    key_row, linear_row, valid, behind = first_rows(n, first, stream, ANCHORS)
    i, member = tl.arange(0, BM) // GH, tl.arange(0, BM) % GH
    f, d = tl.arange(0, BF), tl.arange(0, BV)
    inside = (t + i >= 0) & (t + i < length)

    # linear branch: the state that entered the chunk, and the chunk up to here; its average waits in o
    r = t - stream.shift  # first linear row of the block
    p_o = at(o, batch, first + t, head) + (i * time_step(o) + member * head_step(o))[:, None] + d[None, :]
    mask_o = inside[:, None] & (d < V)[None, :]
    mass = tl.zeros([BM], tl.float32)
    ahead = tl.zeros([BM], tl.float32)
    if r >= 0:
        slot = first_slot(n, first, stream, C) + r // C
        start = r // C * C
        b_fq = load_stack(fq, batch, first, head, t, i, member, inside, BM, FP, BF)
        entry = slot.to(tl.int64) * HS + head_s
        p_s = s + entry * F * V
        p_z = z + entry * F + f
        b_s = load_tile(p_s, V, r * 0, FP, BF, V, BV)
        b_z = tl.load(p_z, mask=f < FP, other=0.0)
        plus, minus = features(b_fq, FP, BF, 1, MAP)
        mass += tl.sum(plus * b_z[None, :], 1)
        if MAP != "identity":
            b_s_minus = load_tile(p_s + FP * V, V, r * 0, FP, BF, V, BV)
            mass += tl.sum(minus * tl.load(p_z + FP, mask=f < FP, other=0.0)[None, :], 1)
        plus, minus = plus.to(LINEAR_DTYPE), minus.to(LINEAR_DTYPE)
        acc = tl.dot(plus, b_s, input_precision=PRECISION)
        if MAP != "identity":
            acc = tl.dot(minus, b_s_minus, acc, input_precision=PRECISION)
        whole, part = load_gates(gates, slot, slots, head_g, r - start + i, HG, C, SPLIT)
        entered = decay_since_start(whole, part, SPLIT)
        acc *= entered[:, None]
        mass *= entered
        p_phi = at(phi, batch, linear_row, head_k)
        if linear_v is None:
            p_v = at(v, batch, key_row + stream.start, head_k)
            v_step = time_step(v)
        else:
            p_v = at(linear_v, batch, linear_row, head_k)
            v_step = time_step(linear_v)
        for j in tl.range(0, r - start + BT, BN, num_stages=STAGES):
            row = start + j
            c = row + tl.arange(0, BN)
            b_phi = load_tile(p_phi, time_step(phi), row, length - stream.shift, BN, FP, BF).to(LINEAR_DTYPE)
            b_v = load_tile(p_v, v_step, row, length - stream.shift, BN, V, BV).to(LINEAR_DTYPE)
            a = tl.dot(plus, tl.trans(b_phi), input_precision=PRECISION)
            if MAP != "identity":
                b_phi = load_tile(p_phi + FP, time_step(phi), row, length - stream.shift, BN, FP, BF)
                a = tl.dot(minus, tl.trans(b_phi), a, input_precision=PRECISION)
            key_whole, key_part = load_key_gates(gates, slot, slots, head_g, j + tl.arange(0, BN), HG, C, SPLIT, KEYED)
            if linear_v is None:  # else the gates say where no key enters
                key_whole = tl.where(c + stream.start >= behind, key_whole, float("inf"))
            decay = decay_between(whole[:, None], part[:, None], key_whole[None, :], key_part[None, :], SPLIT)
            a *= tl.exp2(tl.where((r + i)[:, None] >= c[None, :], decay, float("-inf")))
            mass += tl.sum(a, 1)
            acc = tl.dot(a.to(LINEAR_DTYPE), b_v, acc, input_precision=PRECISION)
        ahead = load_ahead(gates, slot, slots, head_g, r - start + i, HG, C)
        if MAP == "exp":
            ahead += exponential_log2(b_fq)
        if NORMALIZE:
            acc *= tl.where(tl.abs(mass) >= TINY, 1.0 / mass, 0.0)[:, None]
        else:
            acc *= (feature_scale * tl.exp2(ahead))[:, None]
        tl.store(p_o, acc.to(o.ptr.dtype.element_ty), mask=mask_o)

    # window branch: keys t + prefix - W < c <= t + prefix
    b_q = load_stack(q, batch, first, head, t, i, member, inside, BM, D, BD)
    p_k = at(k, batch, key_row, head_k)
    p_v = at(v, batch, key_row, head_k)
    own = t + stream.prefix + i
    keys = length + stream.prefix
    top = tl.full([BM], -1.0e30, tl.float32)
    top_key = tl.zeros([BM], tl.int32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    if ANCHORS > 0:
        kept = tl.minimum(ANCHORS, keys) if OWN else n * 0 + ANCHORS
        p_ak = at_anchors(anchor_k, n, batch, key_row, head_k, OWN)
        p_av = at_anchors(anchor_v, n, batch, key_row, head_k, OWN)
        for a in tl.static_range(0, ANCHORS, 16):
            top, top_key, total, acc = anchor_step(
                b_q, p_ak, p_av, time_step(anchor_k), time_step(anchor_v), a, t + i, kept, n, stream, top, top_key,
                total, acc, score_scale, cap, W, ANCHORS, D, BD, V, BV, DTYPE, PRECISION, RELATIVE,
            )  # fmt: skip
    if living is not None:
        near_top = top
        p_ends = living.ends + (batch.to(tl.int64) * HK + head_k) * (tokens + stream.prefix) + key_row
    for j in tl.range(0, BT + W - 1, BN, num_stages=STAGES):
        row = t + stream.prefix - W + 1 + j
        c = row + tl.arange(0, BN)
        b_k = load_tile(p_k, time_step(k), row, keys, BN, D, BD)
        b_v = load_tile(p_v, time_step(v), row, keys, BN, V, BV)
        score = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
        seen = in_window(own, c, valid, W)
        if living is not None:
            if RELATIVE:
                near_top, top_key = largest(tl.where(seen, score, float("-inf")), c, near_top, top_key)
            seen = seen | outlives(own, c, p_ends, keys)
        score = tl.where(seen, score, float("-inf"))
        top, top_key, total, acc = softmax_step(
            score, b_v, c, top, top_key, total, acc, score_scale, DTYPE, PRECISION, RELATIVE and living is None, False
        )
    if living is not None:
        p_alive, alive = kept_list(living, tl.program_id(0) // (HQ // GH), head_k, HK)
        for j in tl.range(0, alive, BN, num_stages=STAGES):
            c, there, ends = kept_keys(p_alive, p_ends, j, alive, BN)
            b_k = load_rows(p_k + c * time_step(k), there, D, BD)
            b_v = load_rows(p_v + c * time_step(v), there, V, BV)
            score = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
            score = tl.where(own[:, None] < ends[None, :], score, float("-inf"))
            top, top_key, total, acc = softmax_step(
                score, b_v, ends, top, top_key, total, acc, score_scale, DTYPE, PRECISION, False, False
            )
        near_top = (top - near_top) * score_scale  # by how much a kept key's score is the largest
    top *= score_scale
    log_window = top + tl.log2(total)
    if sink is not None:
        b_sink = tl.load(sink + head + member) * LOG2E
        larger = tl.maximum(log_window, b_sink)
        log_window = larger + tl.log2(tl.exp2(log_window - larger) + tl.exp2(b_sink - larger))
        total += tl.exp2(b_sink - top)
    spread = tl.log2(total)
    if living is not None:
        spread += near_top
    weight_window = 1.0 / total  # not exp2(top - log_window), which large scores leave few digits

    # mix
    some = (tl.abs(mass) >= TINY) & (ahead > float("-inf"))
    log_linear = tl.where(some, tl.log2(mass), float("-inf"))
    b_weight = tl.zeros([BM], tl.float32)
    if weight is not None:
        p_weight = at(weight, batch, first + t, head) + i * weight.time + member * weight.head
        b_weight = tl.load(p_weight, mask=inside, other=0.0).to(tl.float32)
    elif not MERGE:
        b_weight += 1.0
    weight_linear = tl.where(some, 1.0, 0.0) if NORMALIZE else tl.full([BM], 1.0, tl.float32)
    if MERGE:
        log_mass = spread if RELATIVE else log_window
        share, rest = shares(log_linear, ahead, feature_scale, log_mass, b_weight)
        weight_linear = tl.where(some, share, 0.0)
        weight_window *= tl.where(some, rest, 1.0)
    else:
        weight_window *= b_weight
    acc *= weight_window[:, None]
    if r >= 0:
        tl.debug_barrier()  # other threads may have written what this one reads
        acc += tl.load(p_o, mask=mask_o, other=0.0).to(tl.float32) * weight_linear[:, None]
    tl.store(p_o, acc.to(o.ptr.dtype.element_ty), mask=mask_o)
    out = (batch.to(tl.int64) * HQ + head + member) * tokens + first + t + i
    tl.store(linear + out, log_linear, mask=inside)
    tl.store(window + out, log_window, mask=inside)
    if RELATIVE:
        tl.store(spread_out + out, spread, mask=inside)
        tl.store(top_key_out + out, top_key, mask=inside)


@triton.jit
def in_window(own, c, valid, W: tl.constexpr):
    """[query, key]: c is one of the W rows up to the query's own, and at least ``valid``."""
    age = own[:, None] - tl.where(c >= valid, c, -(1 << 30))[None, :]
    return tl.cast(age, tl.uint32) < W


@triton.jit
def anchor_seen(c, t, n, stream, W: tl.constexpr, ANCHORS: tl.constexpr):
    """[t, c]: anchor c is one that the window of query t has left behind."""
    age = t - W
    if stream.position is not None:
        age = age + tl.load(stream.position + n)
    return (c[None, :] <= age[:, None]) & (c < ANCHORS)[None, :]


@triton.jit
def shares(log_linear, ahead, feature_scale, log_window, bias):
    """(share of the linear branch, the rest), each with its own digits. log_window: a relative mass's is the spread."""
    x = log_linear + ahead + tl.log2(feature_scale) + bias * LOG2E - log_window
    return 1.0 / (1.0 + tl.exp2(-x)), 1.0 / (1.0 + tl.exp2(x))


def hybrid_output(
    x: FusedInputs, options: FusedOptions, states: States, gates: Tensor, stream: Stream, shape: FusedShape,
    linear_v: Tensor | None = None, kept: Kept | None = None, plan: Plan | None = None,
) -> tuple[Tensor, Masses]:  # fmt: skip
    """Output [B, T, Hq, V] and masses. linear_v: of the linear rows, those of the keys if None. plan: of a known
    kind of call, without either."""
    batch, tokens, heads = x.q.shape[:3]
    o = x.q.new_empty(batch, tokens, heads, shape.value)
    masses = empty_masses(x.q, shape, filled=stream.lengths is not None or kept is not None)
    anchor_k, anchor_v = x.kept_anchors or (x.k, x.v)
    tensors = (
        x.q, x.k, x.v, x.fq, states.phi, anchor_k, anchor_v, o, states.s, states.z, gates, x.weight, x.sink, *masses,
    )  # fmt: skip

    def arguments() -> Arguments:
        c = shape.config("output")
        count, stacked = shape.stack(c.rows)
        blocks = stream_blocks(stream, head_lead(stream.shift, count), count)
        args = (
            *map(strided, tensors[:8]), states.s, states.z, gates,
            None if x.weight is None else strided_heads(x.weight), x.sink, *masses, gates.shape[1], tokens, stream,
            units_of(options.scale, options.softcap) * LOG2E.value, cap_of(options.scale, options.softcap),
            options.feature_scale, None if linear_v is None else strided(linear_v), kept, shape.window,
            shape.anchors, x.kept_anchors is None, heads, shape.key_heads, shape.state_heads, gates.shape[2],
            shape.dim, shape.dim_block, shape.value, shape.value_block, shape.pre, shape.pre_block, shape.chunk, count,
            stacked, c.columns, shape.feature_map, shape.split, shape.keyed, shape.merge,
            shape.merge and shape.relative, shape.normalize, shape.compute_dtype, shape.linear_dtype, shape.precision,
            c.stages,
        )  # fmt: skip
        return blocks * (heads // stacked), args, c.launch

    if tokens and stream.ends > 1:
        launch_planned(plan, "output", output_kernel, tensors, arguments)
    return o, masses


def empty_masses(q: Tensor, shape: FusedShape, filled: bool) -> Masses:
    """Buffers [B, Hq, T]; those that the mix has no use for are empty. filled: there may be rows that no query has."""
    full = (q.shape[0], q.shape[2], q.shape[1])
    some = full if shape.merge and shape.relative else (0,)
    make = q.new_empty
    return Masses(
        make(full, dtype=torch.float32),
        # where no row is, nothing else says so
        q.new_full(full, -torch.inf, dtype=torch.float32) if filled else make(full, dtype=torch.float32),
        make(some, dtype=torch.float32),
        make(some, dtype=torch.int32),
    )
