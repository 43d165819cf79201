"""Backward of the linear branch: the mix, the feature pre-activations, the values and the states."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.triton.call import FusedInputs, FusedOptions
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.fwd import Masses, shares
from lizard_ops.hybrid_attn.triton.state import States, empty_states, scan_states, store_state
from lizard_ops.tiles.decays import decay_between, decay_since_start, load_ahead, load_gates, load_key_gates
from lizard_ops.tiles.features import exponential_log2, features, features_backward, half_features
from lizard_ops.tiles.places import (
    Stream,
    first_rows,
    first_slot,
    head_lead,
    locate_chunk,
    locate_in_stream,
    stream_blocks,
)
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned
from lizard_ops.tiles.strided import (
    at,
    head_step,
    load_stack,
    load_tile,
    load_tile_transposed,
    strided,
    strided_heads,
    time_step,
)


class RowTerms(NamedTuple):
    """What is left of each query's gradient once the mix is taken apart, [B, Hq, T]; do_i . v_j is written d_ij.

    Gradient of a linear weight: slope d_ij + offset. Gradient of a score: p_ij (share d_ij + shift), and ``flow``
    more at the key of the row maximum. In a merge all weights form one average: offset = -slope do.o and
    shift = -share do.o; in a sum either branch is its own.
    """

    slope: Tensor | None
    offset: Tensor | None
    share: Tensor
    shift: Tensor
    flow: Tensor  # gradient of the linear log mass: what passes through the gates between newest key and query
    entered: Tensor | None  # the part of flow that comes from the state


class KeyTerms(NamedTuple):
    """What passes through the gates, per chunk row: weights times their gradients."""

    near: Tensor | None  # [slots, Hs, C] received from the queries of the chunk
    far: Tensor | None  # [slots, Hs, C] received from later chunks
    sent: Tensor | None  # [C // rows, B, Hq, T] what queries send to each block of keys of the chunk


@triton.jit
def linear_query_kernel(
    v, fq, phi, o, do, dfq, s, z, gates, weight, linear, window, spread_in, average, slope_out, offset_out, share_out,
    shift_out, flow_out, entered_out, slots, tokens, stream, feature_scale,
    ANCHORS: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, FP: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, GH: tl.constexpr,
    BN: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr, KEYED: tl.constexpr, MERGE: tl.constexpr,
    RELATIVE: tl.constexpr, NORMALIZE: tl.constexpr, LINEAR_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of fq and row terms of BT queries of GH heads; the blocks are those of the output kernel."""
    F: tl.constexpr = 2 * FP if MAP != "identity" else FP
    BM: tl.constexpr = BT * GH
    head = tl.program_id(0) % (HQ // GH) * GH
    head_k, head_s, head_g = head // (HQ // HK), head // (HQ // HS), head // (HQ // HG)
    lead = (BT - stream.shift % BT) % BT
    n, block, batch, first, length = locate_in_stream(tl.program_id(0) // (HQ // GH), stream, lead, BT)
    t = block * BT - lead
    if t >= length:
        return
    key_row, linear_row, _, behind = first_rows(n, first, stream, ANCHORS)
    i, member = tl.arange(0, BM) // GH, tl.arange(0, BM) % GH
    f = tl.arange(0, BF)
    inside = (t + i >= 0) & (t + i < length)
    out = (batch.to(tl.int64) * HQ + head + member) * tokens + first + t + i
    b_do = load_stack(do, batch, first, head, t, i, member, inside, BM, V, BV)
    b_o = load_stack(o, batch, first, head, t, i, member, inside, BM, V, BV)
    both = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)  # do . o
    b_weight = tl.zeros([BM], tl.float32)
    if weight is not None:
        p_weight = at(weight, batch, first + t, head) + i * weight.time + member * weight.head
        b_weight = tl.load(p_weight, mask=inside, other=0.0).to(tl.float32)
    elif not MERGE:
        b_weight += 1.0
    r = t - stream.shift
    slope, offset, flow = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    rest = tl.full([BM], 1.0, tl.float32)
    p_dfq = at(dfq, batch, first + t, head) + (i * time_step(dfq) + member * head_step(dfq))[:, None] + f[None, :]
    mask_fq = inside[:, None] & (f < FP)[None, :]
    if r >= 0:
        slot = first_slot(n, first, stream, C) + r // C
        start = r // C * C
        ahead = load_ahead(gates, slot, slots, head_g, r - start + i, HG, C)
        if MAP == "exp":
            ahead += exponential_log2(load_stack(fq, batch, first, head, t, i, member, inside, BM, FP, BF))
        log_linear = tl.load(linear + out, mask=inside, other=float("-inf"))
        some = log_linear > float("-inf")
        slope = tl.where(some, tl.exp2(-log_linear), 0.0)
        if MERGE:
            log_window = tl.load((spread_in if RELATIVE else window) + out, mask=inside, other=0.0)
            share, rest = shares(log_linear, ahead, feature_scale, log_window, b_weight)
            slope *= tl.where(some, share, 0.0)
            rest = tl.where(some, rest, 1.0)
            offset = -both * slope
        elif NORMALIZE:
            if b_do.dtype == tl.float32 and MAP != "exp":
                own, mass = linear_sums(
                    b_do, load_stack(fq, batch, first, head, t, i, member, inside, BM, FP, BF), v, phi, s, z, gates,
                    batch, key_row, linear_row, head_k, slot, slots, head_g, slot.to(tl.int64) * HS + head_s, r, i,
                    behind, length, stream, HG, V, BV, FP, BF, C, BT, BN, MAP, SPLIT, KEYED, PRECISION, STAGES,
                )  # fmt: skip
                mass = tl.where(some, mass, 1.0)
                slope = tl.where(some, tl.div_rn(1.0, mass), 0.0)
                offset = -tl.div_rn(own, mass) * slope
            else:
                offset = (b_weight * tl.load(average + out, mask=inside, other=0.0) - both) * slope
        else:
            slope = tl.where(inside, feature_scale * tl.exp2(ahead), 0.0)

        # through the state that entered the chunk
        whole, part = load_gates(gates, slot, slots, head_g, r - start + i, HG, C, SPLIT)
        entered = decay_since_start(whole, part, SPLIT)
        entry = slot.to(tl.int64) * HS + head_s
        p_s, p_z = s + entry * F * V, z + entry * F + f
        b_dol = b_do.to(LINEAR_DTYPE)
        by_state, by_mass = (slope * entered)[:, None], (offset * entered)[:, None]
        b_s = load_tile_transposed(p_s, V, r * 0, FP, BF, V, BV)
        d_minus = tl.zeros([BM, BF], tl.float32)
        if MAP != "identity":
            b_s_minus = load_tile_transposed(p_s + FP * V, V, r * 0, FP, BF, V, BV)
            d_minus = tl.dot(b_dol, b_s_minus, input_precision=PRECISION)
            d_minus = d_minus * by_state + tl.load(p_z + FP, mask=f < FP, other=0.0)[None, :] * by_mass
        d_plus = tl.dot(b_dol, b_s, input_precision=PRECISION)
        d_plus = d_plus * by_state + tl.load(p_z, mask=f < FP, other=0.0)[None, :] * by_mass
        if entered_out is not None:
            b_fq = load_stack(fq, batch, first, head, t, i, member, inside, BM, FP, BF)
            plus, minus = features(b_fq, FP, BF, 1, MAP)
            tl.store(entered_out + out, through_features(plus, minus, d_plus, d_minus, MAP), mask=inside)

        # keys of the same chunk
        p_phi = at(phi, batch, linear_row, head_k)
        p_v = at(v, batch, key_row + stream.start, head_k)
        for j in tl.range(0, r - start + BT, BN, num_stages=STAGES):
            row = start + j
            c = row + tl.arange(0, BN)
            b_phi = load_tile(p_phi, time_step(phi), row, length - stream.shift, BN, FP, BF).to(LINEAR_DTYPE)
            b_v = load_tile(p_v, time_step(v), row, length - stream.shift, BN, V, BV)
            key_whole, key_part = load_key_gates(gates, slot, slots, head_g, j + tl.arange(0, BN), HG, C, SPLIT, KEYED)
            key_whole = tl.where(c + stream.start >= behind, key_whole, float("inf"))
            decay = decay_between(whole[:, None], part[:, None], key_whole[None, :], key_part[None, :], SPLIT)
            decay = tl.exp2(tl.where((r + i)[:, None] >= c[None, :], decay, float("-inf")))
            da = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            da = ((da * slope[:, None] + offset[:, None]) * decay).to(LINEAR_DTYPE)
            d_plus = tl.dot(da, b_phi, d_plus, input_precision=PRECISION)
            if MAP != "identity":
                b_phi = load_tile(p_phi + FP, time_step(phi), row, length - stream.shift, BN, FP, BF)
                d_minus = tl.dot(da, b_phi, d_minus, input_precision=PRECISION)
        b_fq = load_stack(fq, batch, first, head, t, i, member, inside, BM, FP, BF)
        plus, minus = features(b_fq, FP, BF, 1, MAP)
        if MERGE or not NORMALIZE:
            flow = through_features(plus, minus, d_plus, d_minus, MAP)
        b_dfq = features_backward(plus, minus, d_plus, d_minus, MAP)
        tl.store(p_dfq, b_dfq.to(dfq.ptr.dtype.element_ty), mask=mask_fq)
    else:
        tl.store(p_dfq, tl.zeros([BM, BF], dfq.ptr.dtype.element_ty), mask=mask_fq)
    tl.store(slope_out + out, slope, mask=inside)
    tl.store(offset_out + out, offset, mask=inside)
    tl.store(flow_out + out, flow, mask=inside)
    if MERGE:
        tl.store(share_out + out, rest, mask=inside)
        tl.store(shift_out + out, -both * rest, mask=inside)


@triton.jit
def linear_sums(
    b_do, b_fq, v, phi, s, z, gates, batch, key_row, linear_row, head_k, slot, slots, head_g, entry, r, i, behind,
    length, stream,
    HG: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, FP: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr, KEYED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over the keys of each query of float32 weights times d_ij, and of the weights alone.

    Their quotient is do . o_linear. In a sum do . o less the window's part is too, but without the digits that cancel.
    """
    F: tl.constexpr = 2 * FP if MAP != "identity" else FP
    f = tl.arange(0, BF)
    plus, minus = features(b_fq, FP, BF, 1, MAP)
    start = r // C * C
    whole, part = load_gates(gates, slot, slots, head_g, r - start + i, HG, C, SPLIT)
    p_s, p_z = s + entry * F * V, z + entry * F + f
    d = tl.dot(b_do, load_tile_transposed(p_s, V, r * 0, FP, BF, V, BV), input_precision=PRECISION)
    own = tl.sum(plus * d, 1)
    mass = tl.sum(plus * tl.load(p_z, mask=f < FP, other=0.0)[None, :], 1)
    if MAP != "identity":
        b_s = load_tile_transposed(p_s + FP * V, V, r * 0, FP, BF, V, BV)
        own += tl.sum(minus * tl.dot(b_do, b_s, input_precision=PRECISION), 1)
        mass += tl.sum(minus * tl.load(p_z + FP, mask=f < FP, other=0.0)[None, :], 1)
    entered = decay_since_start(whole, part, SPLIT)
    own *= entered
    mass *= entered
    p_phi = at(phi, batch, linear_row, head_k)
    p_v = at(v, batch, key_row + stream.start, head_k)
    for j in tl.range(0, r - start + BT, BN, num_stages=STAGES):
        row = start + j
        c = row + tl.arange(0, BN)
        b_phi = load_tile(p_phi, time_step(phi), row, length - stream.shift, BN, FP, BF)
        a = tl.dot(plus, tl.trans(b_phi), input_precision=PRECISION)
        if MAP != "identity":
            b_phi = load_tile(p_phi + FP, time_step(phi), row, length - stream.shift, BN, FP, BF)
            a = tl.dot(minus, tl.trans(b_phi), a, input_precision=PRECISION)
        key_whole, key_part = load_key_gates(gates, slot, slots, head_g, j + tl.arange(0, BN), HG, C, SPLIT, KEYED)
        key_whole = tl.where(c + stream.start >= behind, key_whole, float("inf"))
        decay = decay_between(whole[:, None], part[:, None], key_whole[None, :], key_part[None, :], SPLIT)
        a *= tl.exp2(tl.where((r + i)[:, None] >= c[None, :], decay, float("-inf")))
        b_v = load_tile(p_v, time_step(v), row, length - stream.shift, BN, V, BV)
        own += tl.sum(a * tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION), 1)
        mass += tl.sum(a, 1)
    return own, mass


@triton.jit
def through_features(plus, minus, d_plus, d_minus, MAP: tl.constexpr):
    """Weights of a row times their gradients, summed: features times theirs."""
    total = tl.sum(plus * d_plus, 1)
    if MAP != "identity":
        total += tl.sum(minus * d_minus, 1)
    return total


@triton.jit
def query_state_kernel(
    fq, do, gates, slope, offset, s, z, slots, tokens, stream,
    HQ: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, FP: tl.constexpr, BF: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, BJ: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr,
    LINEAR_DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the queries of each chunk add to the gradient of one half of the state that enters it."""
    GROUP: tl.constexpr = HQ // HS
    HALVES: tl.constexpr = 2 if MAP != "identity" else 1
    half, entry = tl.program_id(0) % HALVES, tl.program_id(0) // HALVES
    slot, head = entry // HS, entry % HS
    n, i_chunk, batch, first, length = locate_chunk(slot, stream, C)
    head_g = head // (HS // HG)
    t = i_chunk * C + stream.shift
    b_s = tl.zeros([BF, BV], tl.float32)
    b_z = tl.zeros([BF], tl.float32)
    for step in tl.range(0, GROUP * (C // BJ), num_stages=STAGES):
        head_q = head * GROUP + step // (C // BJ)
        j = step % (C // BJ) * BJ
        i = j + tl.arange(0, BJ)
        b_fq = load_tile_transposed(at(fq, batch, first, head_q), time_step(fq), t + j, length, BJ, FP, BF)  # [BF, BJ]
        b_do = load_tile(at(do, batch, first, head_q), time_step(do), t + j, length, BJ, V, BV).to(LINEAR_DTYPE)
        row = (batch.to(tl.int64) * HQ + head_q) * tokens + first + t + i
        b_slope = tl.load(slope + row, mask=t + i < length, other=0.0)
        b_offset = tl.load(offset + row, mask=t + i < length, other=0.0)
        whole, part = load_gates(gates, slot, slots, head_g, i, HG, C, SPLIT)
        entered = decay_since_start(whole, part, SPLIT)
        phi = half_features(b_fq, 1.0 - 2.0 * half, FP, BF, 0, MAP)
        b_s = tl.dot((phi * (b_slope * entered)[None, :]).to(LINEAR_DTYPE), b_do, b_s, input_precision=PRECISION)
        b_z += tl.sum(phi * (b_offset * entered)[None, :], 1)
    store_state(s, z, entry, half, b_s, b_z, FP, BF, V, BV, HALVES)


@triton.jit
def linear_key_kernel(
    v, fq, fk, do, dv, dfk, ds, dz, gates, slope_in, offset_in, near_out, far_out, sent_out, rows_total, slots,
    tokens, stream,
    ANCHORS: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, FP: tl.constexpr, BF: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, KEYED: tl.constexpr, LINEAR_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of BT linear rows of one key head over its query heads: dfk, and dv but for what the window adds.

    The weights are computed key by query, never transposed.
    """
    F: tl.constexpr = 2 * FP if MAP != "identity" else FP
    head = tl.program_id(0) % HK
    n, block, batch, first, length = locate_in_stream(tl.program_id(0) // HK, stream, stream.prefix - stream.start, BT)
    key_row, linear_row, _, behind = first_rows(n, first, stream, ANCHORS)
    r = block * BT  # first linear row
    seen_rows, known_rows = length - stream.shift, length + stream.prefix - stream.start
    j, f, d = tl.arange(0, BT), tl.arange(0, BF), tl.arange(0, BV)
    p_dfk = at(dfk, batch, linear_row + r, head) + (j * time_step(dfk))[:, None] + f[None, :]
    mask_fk = (r + j < known_rows)[:, None] & (f < FP)[None, :]
    if r >= seen_rows:
        tl.store(p_dfk, tl.zeros([BT, BF], dfk.ptr.dtype.element_ty), mask=mask_fk)
        return
    slot = first_slot(n, first, stream, C) + r // C
    start = r // C * C
    p_fk = at(fk, batch, linear_row, head)
    key_plus, key_minus = features(load_tile(p_fk, time_step(fk), r, seen_rows, BT, FP, BF), FP, BF, 1, MAP)
    key_plus, key_minus = key_plus.to(LINEAR_DTYPE), key_minus.to(LINEAR_DTYPE)
    b_v = load_tile(at(v, batch, key_row + stream.start, head), time_step(v), r, seen_rows, BT, V, BV)
    known = (r + j < seen_rows) & (r + j + stream.start >= behind)
    d_plus, d_minus = tl.zeros([BT, BF], tl.float32), tl.zeros([BT, BF], tl.float32)
    b_dv = tl.zeros([BT, BV], tl.float32)
    for own in tl.range(0, HS // HK):
        head_s = head * (HS // HK) + own
        head_g = head_s // (HS // HG)
        entry = slot.to(tl.int64) * HS + head_s
        p_s, p_z = ds + entry * F * V, dz + entry * F + f
        whole, part = load_key_gates(gates, slot, slots, head_g, r - start + j, HG, C, SPLIT, KEYED)
        whole = tl.where(known, whole, float("inf"))

        # through the state that leaves the chunk
        end_whole, end_part = load_gates(gates, slot, slots, head_g, C - 1, HG, C, SPLIT)
        leaving = tl.exp2(decay_between(end_whole, end_part, whole, part, SPLIT))[:, None]
        b_vl = b_v.to(LINEAR_DTYPE)
        from_state = tl.dot(key_plus, load_tile(p_s, V, r * 0, FP, BF, V, BV), input_precision=PRECISION)
        more = tl.dot(b_vl, load_tile_transposed(p_s, V, r * 0, FP, BF, V, BV), input_precision=PRECISION)
        more = (more + tl.load(p_z, mask=f < FP, other=0.0)[None, :]) * leaving
        far = tl.sum(key_plus.to(tl.float32) * more, 1)
        d_plus += more
        if MAP != "identity":
            p_s, p_z = p_s + FP * V, p_z + FP
            b_s = load_tile(p_s, V, r * 0, FP, BF, V, BV)
            from_state = tl.dot(key_minus, b_s, from_state, input_precision=PRECISION)
            more = tl.dot(b_vl, load_tile_transposed(p_s, V, r * 0, FP, BF, V, BV), input_precision=PRECISION)
            more = (more + tl.load(p_z, mask=f < FP, other=0.0)[None, :]) * leaving
            far += tl.sum(key_minus.to(tl.float32) * more, 1)
            d_minus += more
        b_dv += from_state * leaving
        near = tl.zeros([BT], tl.float32)

        # queries of the same chunk
        count = (C - (r - start)) // BN
        for step in tl.range(0, HQ // HS * count, num_stages=STAGES):
            head_q = head_s * (HQ // HS) + step // count
            base = r - start + step % count * BN
            i = base + tl.arange(0, BN)  # in the chunk
            t = start + base + stream.shift
            here = start + i < seen_rows
            out = (batch.to(tl.int64) * HQ + head_q) * tokens + first + start + stream.shift + i
            b_fq = load_tile(at(fq, batch, first, head_q), time_step(fq), t, length, BN, FP, BF)
            b_do = load_tile(at(do, batch, first, head_q), time_step(do), t, length, BN, V, BV)
            slope = tl.load(slope_in + out, mask=here, other=0.0)
            offset = tl.load(offset_in + out, mask=here, other=0.0)
            q_whole, q_part = load_gates(gates, slot, slots, head_g, i, HG, C, SPLIT)
            decay = decay_between(q_whole[None, :], q_part[None, :], whole[:, None], part[:, None], SPLIT)
            decay = tl.exp2(tl.where((r - start + j)[:, None] <= i[None, :], decay, float("-inf")))
            q_plus, q_minus = features(b_fq, FP, BF, 1, MAP)
            q_plus, q_minus = q_plus.to(LINEAR_DTYPE), q_minus.to(LINEAR_DTYPE)
            a = tl.dot(key_plus, tl.trans(q_plus), input_precision=PRECISION)
            if MAP != "identity":
                a = tl.dot(key_minus, tl.trans(q_minus), a, input_precision=PRECISION)
            a *= decay
            da = slope[None, :] * tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) + offset[None, :]
            near += tl.sum(a * da, 1)
            if sent_out is not None:
                p_sent = sent_out + ((r - start) // BT).to(tl.int64) * rows_total + out
                tl.store(p_sent, tl.sum(a * da, 0), mask=here)
            a = (a * slope[None, :]).to(LINEAR_DTYPE)
            b_dv = tl.dot(a, b_do.to(LINEAR_DTYPE), b_dv, input_precision=PRECISION)
            da = (da * decay).to(LINEAR_DTYPE)
            d_plus = tl.dot(da, q_plus, d_plus, input_precision=PRECISION)
            if MAP != "identity":
                d_minus = tl.dot(da, q_minus, d_minus, input_precision=PRECISION)
        if near_out is not None:
            row = (slot.to(tl.int64) * HS + head_s) * C + r - start + j
            tl.store(near_out + row, near)
            tl.store(far_out + row, far)
    p_dv = at(dv, batch, key_row + stream.start + r, head) + (j * time_step(dv))[:, None] + d[None, :]
    mask_v = (r + j < seen_rows)[:, None] & (d < V)[None, :]
    tl.store(p_dv, b_dv.to(dv.ptr.dtype.element_ty), mask=mask_v)
    plus, minus = features(load_tile(p_fk, time_step(fk), r, seen_rows, BT, FP, BF), FP, BF, 1, MAP)
    b_dfk = features_backward(plus, minus, d_plus, d_minus, MAP)
    tl.store(p_dfk, b_dfk.to(dfk.ptr.dtype.element_ty), mask=mask_fk)


def empty_terms(masses: Masses, numeric: bool) -> RowTerms:
    """Buffers [B, Hq, T]; ``entered`` is there if ``numeric``."""
    make = torch.empty_like
    return RowTerms(*(make(masses.linear) for _ in range(5)), torch.zeros_like(masses.linear) if numeric else None)


def linear_queries(
    x: FusedInputs, options: FusedOptions, states: States, gates: Tensor, o: Tensor, do: Tensor, masses: Masses,
    average: Tensor | None, terms: RowTerms, stream: Stream, shape: FusedShape, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """dfq; fills ``terms``, in a sum all but share and shift. average: do . o_window of a sum. plan: of a known kind of
    call."""
    v, fq, weight = x.v, x.fq, x.weight
    dfq = fq.new_empty(fq.shape)
    tokens, heads = fq.shape[1:3]
    tensors = (
        v, fq, states.phi, o, do, dfq, states.s, states.z, gates, weight, masses.linear, masses.window, masses.spread,
        average, *terms,
    )  # fmt: skip

    def arguments() -> Arguments:
        c = shape.config("linear_query")
        count, stacked = shape.stack(c.rows)
        blocks = stream_blocks(stream, head_lead(stream.shift, count), count)
        args = (
            *map(strided, tensors[:6]), states.s, states.z, gates, None if weight is None else strided_heads(weight),
            *tensors[10:], gates.shape[1], tokens, stream, options.feature_scale, shape.anchors, heads, shape.key_heads,
            shape.state_heads, gates.shape[2], shape.value, shape.value_block, shape.pre, shape.pre_block, shape.chunk,
            count, stacked, c.columns, shape.feature_map, shape.split, shape.keyed, shape.merge,
            shape.merge and shape.relative, shape.normalize, shape.linear_dtype, shape.precision, c.stages,
        )  # fmt: skip
        return blocks * (heads // stacked), args, c.launch

    if tokens and stream.ends > 1:
        launch_planned(plan, "linear queries", linear_query_kernel, tensors, arguments)
    return dfq


def query_states(
    fq: Tensor, do: Tensor, gates: Tensor, terms: RowTerms, end: tuple[Tensor, Tensor] | None, stream: Stream,
    shape: FusedShape, start: bool, plan: Plan | None = None,
) -> States:  # fmt: skip
    """Gradient of the state that leaves each chunk, and with ``start`` of the first one; end: that of the last one."""
    states = empty_states(gates, stream, shape, start)
    slots = gates.shape[1]
    tensors = (fq, do, gates, terms.slope, terms.offset, states.s, states.z)

    def arguments() -> Arguments:
        c = shape.config("query_state")
        args = (
            strided(fq), strided(do), *tensors[2:], slots, do.shape[1], stream, shape.query_heads, shape.state_heads,
            gates.shape[2], shape.pre, shape.pre_block, shape.value, shape.value_block, shape.chunk, c.rows,
            shape.feature_map, shape.split, shape.linear_dtype, shape.precision, c.stages,
        )  # fmt: skip
        return slots * shape.state_heads * shape.halves, args, c.launch

    if slots:
        launch_planned(plan, "query states", query_state_kernel, tensors, arguments)
    scan_states(states, end, gates, stream, shape, reverse=True, plan=plan)
    return states


def linear_keys(
    v: Tensor, fq: Tensor, fk: Tensor, do: Tensor, gates: Tensor, terms: RowTerms, d_states: States, stream: Stream,
    shape: FusedShape, gate_gradient: bool, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, KeyTerms | None]:  # fmt: skip
    """(dv in the linear rows that some query sees, dfk, what the gates see of the keys)."""
    dv, dfk = (x.new_empty(x.shape) for x in (v, fk))
    c = shape.config("linear_key")
    of_keys = KeyTerms(None, None, None)
    if gate_gradient:
        near, far = (gates.new_empty(gates.shape[1], shape.state_heads, shape.chunk) for _ in range(2))
        sent = None if terms.entered is None else gates.new_zeros(shape.chunk // c.rows, *terms.flow.shape)
        of_keys = KeyTerms(near, far, sent)
    tensors = (v, fq, fk, do, dv, dfk, d_states.s, d_states.z, gates, terms.slope, terms.offset, *of_keys)

    def arguments() -> Arguments:
        blocks = stream_blocks(stream, stream.prefix - stream.start, c.rows)
        args = (
            *map(strided, tensors[:6]), *tensors[6:], terms.flow.numel(), gates.shape[1], fq.shape[1], stream,
            shape.anchors, shape.query_heads, shape.key_heads, shape.state_heads, gates.shape[2], shape.value,
            shape.value_block, shape.pre, shape.pre_block, shape.chunk, c.rows, c.columns, shape.feature_map,
            shape.split, shape.keyed, shape.linear_dtype, shape.precision, c.stages,
        )  # fmt: skip
        return blocks * shape.key_heads, args, c.launch

    if stream_blocks(stream, stream.prefix - stream.start, c.rows):
        launch_planned(plan, "linear keys", linear_key_kernel, tensors, arguments)
    return dv, dfk, of_keys if gate_gradient else None
