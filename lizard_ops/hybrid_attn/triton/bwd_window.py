"""Backward of the window branch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.triton.bwd_linear import RowTerms
from lizard_ops.hybrid_attn.triton.call import FusedInputs, FusedOptions
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.fwd import Masses, anchor_seen, in_window
from lizard_ops.hybrid_attn.triton.kept import kept_keys, kept_list, outlives
from lizard_ops.hybrid_attn.triton.kept_bwd import kept_key_gradients
from lizard_ops.hybrid_attn.triton.kept_index import Index
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import Stream, first_rows, locate_in_stream, stream_blocks
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned
from lizard_ops.tiles.softcap import cap_of, cap_slope, capped, units
from lizard_ops.tiles.strided import (
    at,
    at_anchors,
    head_step,
    load_rows,
    load_stack,
    load_tile,
    rows_last,
    strided,
    strided_heads,
    time_step,
)
from lizard_ops.tiles.sums import add_product
from lizard_ops.window_attn.triton.bwd_keys import RowStats, key_gradients
from lizard_ops.window_attn.triton.config import WindowCall, WindowNumbers


@triton.jit
def window_query_kernel(
    q, k, v, anchor_k, anchor_v, do, dq, weight, sink, window, top_key_in, share_io, shift_io, flow_io, average_out,
    tokens, stream, scale, cap, living,
    W: tl.constexpr, ANCHORS: tl.constexpr, OWN: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GH: tl.constexpr, BN: tl.constexpr,
    MERGE: tl.constexpr, RELATIVE: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of BT queries of GH heads of a group. EXACT finds do . o_window first, and with it the scores' shift.

    The weights of a row sum up to one but for the rounding of its log-sum-exp, 2^-24 of its size. Where one key has
    nearly all the weight, its gradient is a difference that this would be the whole of: so do . o_window is divided
    by the sum of the weights, sinks included. living: the keys that outlive their window.
    """
    BM: tl.constexpr = BT * GH
    head = tl.program_id(0) % (HQ // GH) * GH
    head_k = head // (HQ // HK)
    n, block, batch, first, length = locate_in_stream(tl.program_id(0) // (HQ // GH), stream, 0, BT)
    t = block * BT
    if t >= length:
        return
    key_row, _, valid, _ = first_rows(n, first, stream, ANCHORS)
    i, member, d = tl.arange(0, BM) // GH, tl.arange(0, BM) % GH, tl.arange(0, BD)
    inside = t + i < length
    out = (batch.to(tl.int64) * HQ + head + member) * tokens + first + t + i
    b_q = load_stack(q, batch, first, head, t, i, member, inside, BM, D, BD)
    b_do = load_stack(do, batch, first, head, t, i, member, inside, BM, V, BV)
    log_window = tl.load(window + out, mask=inside, other=float("inf"))
    p_k = at(k, batch, key_row, head_k)
    p_v = at(v, batch, key_row, head_k)
    own = t + stream.prefix + i
    keys = length + stream.prefix
    kept = tl.minimum(ANCHORS, keys) if OWN else n * 0 + ANCHORS
    p_ak = at_anchors(anchor_k, n, batch, key_row, head_k, OWN)
    p_av = at_anchors(anchor_v, n, batch, key_row, head_k, OWN)
    score_scale = units(scale, cap) * LOG2E
    if MERGE:
        share = tl.load(share_io + out, mask=inside, other=0.0)
        shift = tl.load(shift_io + out, mask=inside, other=0.0)
        flow = tl.load(flow_io + out, mask=inside, other=0.0)
    else:
        share = tl.full([BM], 1.0, tl.float32)
        shift, flow = share, tl.zeros([BM], tl.float32)
        if weight is not None:
            p_weight = at(weight, batch, first + t, head) + i * weight.time + member * weight.head
            share = tl.load(p_weight, mask=inside, other=0.0).to(tl.float32)
        tl.store(share_io + out, share, mask=inside)
    if living is not None:
        p_ends = living.ends + (batch.to(tl.int64) * HK + head_k) * (tokens + stream.prefix) + key_row
        p_alive, alive = kept_list(living, tl.program_id(0) // (HQ // GH), head_k, HK)
    if EXACT:
        average = tl.zeros([BM], tl.float32)
        total = tl.zeros([BM], tl.float32)
        if sink is not None:
            b_sink = tl.load(sink + head + member) * LOG2E
            total += tl.where(log_window > float("-inf"), tl.exp2(b_sink - log_window), 0.0)
        for j in tl.range(0, BT + W - 1, BN, num_stages=STAGES):
            row = t + stream.prefix - W + 1 + j
            c = row + tl.arange(0, BN)
            b_k = load_tile(p_k, time_step(k), row, keys, BN, D, BD)
            b_v = load_tile(p_v, time_step(v), row, keys, BN, V, BV)
            seen = in_window(own, c, valid, W)
            if living is not None:
                seen = seen | outlives(own, c, p_ends, keys)
            p, dp, unused = weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, cap, PRECISION)
            average += tl.sum(p * dp, 1)
            total += tl.sum(p, 1)
        for j in tl.range(0, ANCHORS, 16):
            c = j + tl.arange(0, 16)
            b_k = load_tile(p_ak, time_step(anchor_k), n * 0 + j, kept, 16, D, BD)
            b_v = load_tile(p_av, time_step(anchor_v), n * 0 + j, kept, 16, V, BV)
            seen = anchor_seen(c, t + i, n, stream, W, ANCHORS)
            p, dp, unused = weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, cap, PRECISION)
            average += tl.sum(p * dp, 1)
            total += tl.sum(p, 1)
        if living is not None:
            for j in tl.range(0, alive, BN, num_stages=STAGES):
                c, there, ends = kept_keys(p_alive, p_ends, j, alive, BN)
                b_k = load_rows(p_k + c * time_step(k), there, D, BD)
                b_v = load_rows(p_v + c * time_step(v), there, V, BV)
                seen = own[:, None] < ends[None, :]
                p, dp, unused = weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, cap, PRECISION)
                average += tl.sum(p * dp, 1)
                total += tl.sum(p, 1)
        average = tl.where(total > 0.0, average / total, 0.0)
        if MERGE:  # flow is share (do.o_linear - do.o) too, which loses its digits where the linear branch has the mass
            flow = tl.where(share < 0.5, -shift - share * average, flow)
            tl.store(flow_io + out, flow, mask=inside)
        shift = -share * average - flow
        tl.store(shift_io + out, shift, mask=inside)
        if not MERGE:
            tl.store(average_out + out, average, mask=inside)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for j in tl.range(0, BT + W - 1, BN, num_stages=STAGES):
        row = t + stream.prefix - W + 1 + j
        c = row + tl.arange(0, BN)
        b_k = load_tile(p_k, time_step(k), row, keys, BN, D, BD)
        b_v = load_tile(p_v, time_step(v), row, keys, BN, V, BV)
        seen = in_window(own, c, valid, W)
        if living is not None:
            seen = seen | outlives(own, c, p_ends, keys)
        p, dp, slope = weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, cap, PRECISION)
        ds = p * (share[:, None] * dp + shift[:, None]) * slope
        b_dq = add_product(b_dq, ds.to(DTYPE), b_k, inside[:, None], PRECISION)
    for j in tl.range(0, ANCHORS, 16):
        c = j + tl.arange(0, 16)
        b_k = load_tile(p_ak, time_step(anchor_k), n * 0 + j, kept, 16, D, BD)
        b_v = load_tile(p_av, time_step(anchor_v), n * 0 + j, kept, 16, V, BV)
        seen = anchor_seen(c, t + i, n, stream, W, ANCHORS)
        p, dp, slope = weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, cap, PRECISION)
        ds = p * (share[:, None] * dp + shift[:, None]) * slope
        b_dq = add_product(b_dq, ds.to(DTYPE), b_k, inside[:, None], PRECISION)
    if living is not None:
        for j in tl.range(0, alive, BN, num_stages=STAGES):
            c, there, ends = kept_keys(p_alive, p_ends, j, alive, BN)
            b_k = load_rows(p_k + c * time_step(k), there, D, BD)
            b_v = load_rows(p_v + c * time_step(v), there, V, BV)
            seen = own[:, None] < ends[None, :]
            p, dp, slope = weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, cap, PRECISION)
            ds = p * (share[:, None] * dp + shift[:, None]) * slope
            b_dq = tl.dot(ds.to(DTYPE), b_k, b_dq, input_precision=PRECISION)
    if RELATIVE:
        top_key = tl.load(top_key_in + out, mask=inside, other=0)
        of_k = p_k + top_key.to(tl.int64) * time_step(k)
        if ANCHORS > 0:
            of_k = tl.where(top_key >= 0, of_k, p_ak + (-1 - top_key).to(tl.int64) * time_step(anchor_k))
        mask = inside[:, None] & (d < D)[None, :]
        b_top = tl.load(of_k[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if cap is not None:
            flow *= cap_slope(capped(tl.sum(b_q.to(tl.float32) * b_top, 1), cap), cap)
        b_dq += flow[:, None] * b_top
    p_dq = at(dq, batch, first + t, head) + (i * time_step(dq) + member * head_step(dq))[:, None] + d[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, cap, PRECISION: tl.constexpr):
    """(p_ij, do_i . v_j, ``cap_slope``) of one tile of window keys."""
    score = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
    slope = cap_slope(score, cap)
    dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    score = score * score_scale - log_window[:, None]
    return tl.exp2(tl.where(seen, score, float("-inf"))), dp, slope


def window_queries(
    x: FusedInputs,
    options: FusedOptions,
    do: Tensor,
    masses: Masses,
    terms: RowTerms,
    stream: Stream,
    shape: FusedShape,
    index: Index | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(dq, in a sum do . o_window [B, Hq, T]); a sum's share and shift go to ``terms``. index: of kept keys. plan: of a
    known kind of call without any."""
    q, k, v, weight = x.q, x.k, x.v, x.weight
    tokens, heads = q.shape[1:3]
    dq = q.new_empty(q.shape)
    average = None if shape.merge else torch.empty_like(terms.share)
    tensors = (
        q, k, v, *(x.kept_anchors or (k, v)), do, dq, weight, x.sink, masses.window, masses.top_key, terms.share,
        terms.shift, terms.flow, average,
    )  # fmt: skip

    def arguments() -> Arguments:
        c = shape.config("window_query")
        if index is not None:
            c = c._replace(rows=shape.config("output").rows)  # of whose blocks it has lists
        count, stacked = shape.stack(c.rows)
        args = (
            *map(strided, tensors[:7]), None if weight is None else strided_heads(weight), *tensors[8:], tokens, stream,
            options.scale, cap_of(options.scale, options.softcap), None if index is None else index.kept, shape.window,
            shape.anchors, x.kept_anchors is None, heads, shape.key_heads, shape.dim, shape.dim_block, shape.value,
            shape.value_block, count, stacked, c.columns, shape.merge, shape.merge and shape.relative, shape.exact,
            shape.compute_dtype, shape.precision, c.stages,
        )  # fmt: skip
        return stream_blocks(stream, 0, count) * (heads // stacked), args, c.launch

    if tokens and stream.ends > 1:
        launch_planned(plan, "window queries", window_query_kernel, tensors, arguments)
    return dq, average


def window_keys(
    x: FusedInputs, options: FusedOptions, do: Tensor, dv: Tensor, masses: Masses, terms: RowTerms, stream: Stream,
    shape: FusedShape, index: Index | None = None, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dk, d anchor_k, d anchor_v), the last two empty where the anchors are rows of k and v; adds to the dv of
    ``linear_keys``, which has all rows of keys that enter the sums by an index. index: of kept keys. plan: of a known
    kind of call without any."""
    tokens = x.q.shape[1]
    relative = shape.merge and shape.relative
    log_window, term, share = masses.window, -terms.shift, terms.share
    if shape.merge and shape.dtype != torch.float32:  # p share = exp(s - lse + log share): one number less a row
        log_window = log_window - share.log2()
        term, share = torch.where(share > 0.0, term / share, 0.0), None
    stats = RowStats(
        lse=log_window, term=term, share=share, arg_max=masses.top_key if relative else None,
        d_max=terms.flow if relative else None, strides=(shape.query_heads * tokens, 1, tokens), to_log2=1.0,
    )  # fmt: skip
    q, k, v, do = rows_last(x.q, x.k, x.v, do)
    call = WindowCall(
        q=q, k=k, v=v, anchor_k=x.anchor_k, anchor_v=x.anchor_v, sinks=None, first=stream.position,
        cu_seqlens=stream.cu_seqlens, lengths=stream.lengths,
    )  # fmt: skip
    numbers = WindowNumbers(
        window=shape.window, anchors=shape.anchors, prefix=stream.prefix, scale=options.scale, softcap=options.softcap
    )
    enters = index is not None and options.outside
    there = (dv, 0, -stream.prefix) if enters else (dv, stream.start, stream.shift)
    dk, _, *of_anchors = key_gradients(
        call, numbers, do, stats, beyond=True, there=there,
        ends=None if index is None else index.ends, plan=plan,
    )  # fmt: skip
    if index is not None:
        kept_key_gradients(call, options, do, stats, (dk, dv), index, stream, shape)
    return dk, *of_anchors
