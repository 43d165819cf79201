"""Backward of the window branch: queries, keys, values and anchors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.chunk_triton_bwd_linear import RowTerms
from lizard_ops.hybrid_attn.chunk_triton_config import Shape
from lizard_ops.hybrid_attn.chunk_triton_fwd import Masses, anchor_seen
from lizard_ops.hybrid_attn.chunk_triton_tiles import (
    LOG2E,
    Stream,
    at,
    at_anchors,
    block_count,
    first_rows,
    head_rows,
    in_window,
    load_stack,
    load_tile,
    locate,
    power_of_two,
    rows,
    sequence,
)

ANCHOR_SPAN = 256  # queries whose gradients of the anchors are summed in one block


@triton.jit
def window_query_kernel(
    q, k, v, anchor_k, anchor_v, do, dq, weight, window, top_key_in, share_io, shift_io, flow_in, average_out, tokens,
    stream, scale,
    W: tl.constexpr, ANCHORS: tl.constexpr, OWN: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, GH: tl.constexpr, BN: tl.constexpr,
    MERGE: tl.constexpr, RELATIVE: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of BT queries of GH heads of a group. EXACT finds do . o_window first, and with it the scores' shift."""
    BM: tl.constexpr = BT * GH
    head = tl.program_id(0) % (HQ // GH) * GH
    head_k = head // (HQ // HK)
    n, block, batch, first, length = locate(tl.program_id(0) // (HQ // GH), stream, 0, BT)
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
    score_scale = scale * LOG2E
    if MERGE:
        share = tl.load(share_io + out, mask=inside, other=0.0)
        shift = tl.load(shift_io + out, mask=inside, other=0.0)
        flow = tl.load(flow_in + out, mask=inside, other=0.0)
    else:
        share = tl.full([BM], 1.0, tl.float32)
        shift, flow = share, tl.zeros([BM], tl.float32)
        if weight is not None:
            p_weight = at(weight, batch, first + t, head) + i * weight.time + member * weight.head
            share = tl.load(p_weight, mask=inside, other=0.0).to(tl.float32)
        tl.store(share_io + out, share, mask=inside)
    if EXACT:
        average = tl.zeros([BM], tl.float32)
        for j in tl.range(0, BT + W - 1, BN, num_stages=STAGES):
            row = t + stream.prefix - W + 1 + j
            c = row + tl.arange(0, BN)
            b_k = load_tile(p_k, k.time, row, keys, BN, D, BD)
            b_v = load_tile(p_v, v.time, row, keys, BN, V, BV)
            p, dp = weights(b_q, b_do, b_k, b_v, in_window(own, c, valid, W), log_window, score_scale, PRECISION)
            average += tl.sum(p * dp, 1)
        for j in tl.range(0, ANCHORS, 16):
            c = j + tl.arange(0, 16)
            b_k = load_tile(p_ak, anchor_k.time, n * 0 + j, kept, 16, D, BD)
            b_v = load_tile(p_av, anchor_v.time, n * 0 + j, kept, 16, V, BV)
            seen = anchor_seen(c, t + i, n, stream, W, ANCHORS)
            p, dp = weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, PRECISION)
            average += tl.sum(p * dp, 1)
        shift = -share * average - flow
        tl.store(shift_io + out, shift, mask=inside)
        if not MERGE:
            tl.store(average_out + out, average, mask=inside)
    b_dq = tl.zeros([BM, BD], tl.float32)
    for j in tl.range(0, BT + W - 1, BN, num_stages=STAGES):
        row = t + stream.prefix - W + 1 + j
        c = row + tl.arange(0, BN)
        b_k = load_tile(p_k, k.time, row, keys, BN, D, BD)
        b_v = load_tile(p_v, v.time, row, keys, BN, V, BV)
        p, dp = weights(b_q, b_do, b_k, b_v, in_window(own, c, valid, W), log_window, score_scale, PRECISION)
        ds = p * (share[:, None] * dp + shift[:, None])
        b_dq = tl.dot(ds.to(DTYPE), b_k, b_dq, input_precision=PRECISION)
    for j in tl.range(0, ANCHORS, 16):
        c = j + tl.arange(0, 16)
        b_k = load_tile(p_ak, anchor_k.time, n * 0 + j, kept, 16, D, BD)
        b_v = load_tile(p_av, anchor_v.time, n * 0 + j, kept, 16, V, BV)
        seen = anchor_seen(c, t + i, n, stream, W, ANCHORS)
        p, dp = weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, PRECISION)
        ds = p * (share[:, None] * dp + shift[:, None])
        b_dq = tl.dot(ds.to(DTYPE), b_k, b_dq, input_precision=PRECISION)
    if RELATIVE:
        top_key = tl.load(top_key_in + out, mask=inside, other=0)
        of_k = p_k + top_key.to(tl.int64) * k.time
        if ANCHORS > 0:
            of_k = tl.where(top_key >= 0, of_k, p_ak + (-1 - top_key).to(tl.int64) * anchor_k.time)
        mask = inside[:, None] & (d < D)[None, :]
        b_dq += flow[:, None] * tl.load(of_k[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    p_dq = at(dq, batch, first + t, head) + (i * dq.time + member * dq.head)[:, None] + d[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def weights(b_q, b_do, b_k, b_v, seen, log_window, score_scale, PRECISION: tl.constexpr):
    """(p_ij, do_i . v_j) of one tile of window keys."""
    score = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    score = score * score_scale - log_window[:, None]
    return tl.exp2(tl.where(seen, score, float("-inf"))), dp


@triton.jit
def window_key_kernel(
    q, k, v, do, dk, dv, window, top_key_in, share_in, shift_in, flow_in, tokens, stream, scale,
    W: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, RELATIVE: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of BT keys and values of one key head over its query heads.

    The weights are computed key by query, never transposed.
    """
    GROUP: tl.constexpr = HQ // HK
    STEPS: tl.constexpr = (BT + W - 1 + BN - 1) // BN
    head = tl.program_id(0) % HK
    n, block, batch, first, length = locate(tl.program_id(0) // HK, stream, stream.prefix, BT)
    row = block * BT
    keys = length + stream.prefix
    if row >= keys:
        return
    key_row, _, valid, _ = first_rows(n, first, stream, 0)
    j, d_k, d_v = tl.arange(0, BT), tl.arange(0, BD), tl.arange(0, BV)
    c = row + j
    b_k = load_tile(at(k, batch, key_row, head), k.time, row, keys, BT, D, BD)
    b_v = load_tile(at(v, batch, key_row, head), v.time, row, keys, BT, V, BV)
    b_dk = tl.zeros([BT, BD], tl.float32)
    b_dv = tl.zeros([BT, BV], tl.float32)
    score_scale = scale * LOG2E
    for step in tl.range(0, GROUP * STEPS, num_stages=STAGES):  # queries c - prefix <= t < c - prefix + W
        head_q = head * GROUP + step // STEPS
        t = row - stream.prefix + step % STEPS * BN
        i = t + tl.arange(0, BN)
        b_q = load_tile(at(q, batch, first, head_q), q.time, t, length, BN, D, BD)
        b_do = load_tile(at(do, batch, first, head_q), do.time, t, length, BN, V, BV)
        own = i + stream.prefix
        age = own[None, :] - tl.where(c >= valid, c, -(1 << 30))[:, None]
        seen = tl.cast(age, tl.uint32) < W
        here = (i >= 0) & (i < length)
        out = (batch.to(tl.int64) * HQ + head_q) * tokens + first + i
        p, ds = weights_transposed(
            b_q, b_do, b_k, b_v, seen, c, out, here, window, top_key_in, share_in, shift_in, flow_in, score_scale,
            RELATIVE, PRECISION,
        )  # fmt: skip
        b_dv = tl.dot(p.to(DTYPE), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(ds.to(DTYPE), b_q, b_dk, input_precision=PRECISION)
    inside = (c < keys)[:, None]
    p_dk = at(dk, batch, key_row + row, head) + (j * dk.time)[:, None] + d_k[None, :]
    tl.store(p_dk, (b_dk * scale).to(dk.ptr.dtype.element_ty), mask=inside & (d_k < D)[None, :])
    p_dv = at(dv, batch, key_row + row, head) + (j * dv.time)[:, None] + d_v[None, :]
    tl.store(p_dv, b_dv.to(dv.ptr.dtype.element_ty), mask=inside & (d_v < V)[None, :])


@triton.jit
def weights_transposed(
    b_q, b_do, b_k, b_v, seen, index, out, here, window, top_key_in, share_in, shift_in, flow_in, score_scale,
    RELATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(share_i p_ij, gradient of the score) of a tile [keys, queries]; index: what top_key calls the keys."""
    log_window = tl.load(window + out, mask=here, other=float("inf"))
    share = tl.load(share_in + out, mask=here, other=0.0)
    shift = tl.load(shift_in + out, mask=here, other=0.0)
    score = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    p = tl.exp2(tl.where(seen, score * score_scale - log_window[None, :], float("-inf")))
    ds = p * (share[None, :] * dp + shift[None, :])
    if RELATIVE:
        top_key = tl.load(top_key_in + out, mask=here, other=-(1 << 30))
        flow = tl.load(flow_in + out, mask=here, other=0.0)
        ds += tl.where(index[:, None] == top_key[None, :], flow[None, :], 0.0)
    return p * share[None, :], ds


@triton.jit
def anchor_kernel(
    q, anchor_k, anchor_v, do, d_anchor_k, d_anchor_v, window, top_key_in, share_in, shift_in, flow_in, tokens,
    stream, scale,
    W: tl.constexpr, ANCHORS: tl.constexpr, OWN: tl.constexpr, BA: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr,
    RELATIVE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the anchors from SPAN queries of one key head's group, one entry a block."""
    GROUP: tl.constexpr = HQ // HK
    head = tl.program_id(0) % HK
    entry = tl.program_id(0) // HK
    n, block, batch, first, length = locate(entry, stream, 0, SPAN)
    a = tl.arange(0, BA)
    key_row, _, _, _ = first_rows(n, first, stream, ANCHORS)
    kept = tl.minimum(ANCHORS, length) if OWN else n * 0 + ANCHORS
    b_k = load_tile(at_anchors(anchor_k, n, batch, key_row, head, OWN), anchor_k.time, n * 0, kept, BA, D, BD)
    b_v = load_tile(at_anchors(anchor_v, n, batch, key_row, head, OWN), anchor_v.time, n * 0, kept, BA, V, BV)
    b_dk = tl.zeros([BA, BD], tl.float32)
    b_dv = tl.zeros([BA, BV], tl.float32)
    for step in tl.range(0, GROUP * (SPAN // BN), num_stages=STAGES):
        head_q = head * GROUP + step // (SPAN // BN)
        t = block * SPAN + step % (SPAN // BN) * BN
        i = t + tl.arange(0, BN)
        b_q = load_tile(at(q, batch, first, head_q), q.time, t, length, BN, D, BD)
        b_do = load_tile(at(do, batch, first, head_q), do.time, t, length, BN, V, BV)
        here = i < length
        out = (batch.to(tl.int64) * HQ + head_q) * tokens + first + i
        age = i - W
        if stream.position is not None:
            age = age + tl.load(stream.position + n)
        seen = (a[:, None] <= age[None, :]) & (a < ANCHORS)[:, None]
        p, ds = weights_transposed(
            b_q, b_do, b_k, b_v, seen, -1 - a, out, here, window, top_key_in, share_in, shift_in, flow_in,
            scale * LOG2E, RELATIVE, PRECISION,
        )  # fmt: skip
        b_dv = tl.dot(p.to(DTYPE), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(ds.to(DTYPE), b_q, b_dk, input_precision=PRECISION)
    base = (entry.to(tl.int64) * HK + head) * ANCHORS + a
    mask = a < ANCHORS
    d_k, d_v = tl.arange(0, BD), tl.arange(0, BV)
    tl.store(d_anchor_k + base[:, None] * D + d_k[None, :], b_dk * scale, mask=mask[:, None] & (d_k < D)[None, :])
    tl.store(d_anchor_v + base[:, None] * V + d_v[None, :], b_dv, mask=mask[:, None] & (d_v < V)[None, :])


@triton.jit
def anchor_sum_kernel(
    parts, out, stream, ANCHORS: tl.constexpr, OWN: tl.constexpr, HK: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Sum of the anchors' gradients over the blocks of each sequence, in order, onto those of OWN rows."""
    pid = tl.program_id(0)
    n, a, head = pid // (HK * ANCHORS), pid // HK % ANCHORS, pid % HK
    batch, first, length = sequence(n, stream)
    entry = n * tl.cdiv(stream.length, SPAN)
    if stream.cu_seqlens is not None:
        entry = first // SPAN + n
    d = tl.arange(0, BD)
    mask = d < DIM
    if OWN:
        key_row, _, _, _ = first_rows(n, first, stream, ANCHORS)
        p_out = at(out, batch, key_row + a, head) + d
        mask = mask & (a + d * 0 < length)
        acc = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
    else:
        p_out = at(out, n, a, head) + d
        acc = tl.zeros([BD], tl.float32)
    for i in tl.range(0, tl.cdiv(length, SPAN)):
        base = (((entry + i).to(tl.int64) * HK + head) * ANCHORS + a) * DIM
        acc += tl.load(parts + base + d, mask=mask, other=0.0)
    tl.store(p_out, acc.to(out.ptr.dtype.element_ty), mask=mask)


def window_queries(
    q: Tensor, k: Tensor, v: Tensor, anchors: tuple[Tensor, Tensor] | None, do: Tensor, weight: Tensor | None,
    masses: Masses, terms: RowTerms, scale: float, stream: Stream, shape: Shape,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dq, in a sum do . o_window [B, Hq, T]); a sum's share and shift go to ``terms``."""
    batch, tokens, heads = q.shape[:3]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    average = None if shape.merge else torch.empty_like(terms.share)
    c = shape.config("window_query")
    count, stacked = shape.stack(c.rows)
    blocks = block_count(stream, 0, count)
    if blocks and tokens:
        anchor_k, anchor_v = (k, v) if anchors is None else anchors
        window_query_kernel[(blocks * (heads // stacked),)](
            rows(q), rows(k), rows(v), rows(anchor_k), rows(anchor_v), rows(do), rows(dq),
            None if weight is None else head_rows(weight), masses.window, masses.top_key, terms.share, terms.shift,
            terms.flow, average, tokens, stream, scale, shape.window, shape.anchors, anchors is None, heads,
            shape.key_heads, shape.dim, shape.dim_block, shape.value, shape.value_block, count, stacked, c.columns,
            shape.merge, shape.merge and shape.relative, shape.exact, shape.compute_dtype, shape.precision, c.stages,
            **c.launch,
        )  # fmt: skip
    return dq, average


def window_keys(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, masses: Masses, terms: RowTerms, scale: float, stream: Stream,
    shape: Shape,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dk, dv)."""
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    c = shape.config("window_key")
    blocks = block_count(stream, stream.prefix, c.rows)
    if blocks:
        window_key_kernel[(blocks * shape.key_heads,)](
            rows(q), rows(k), rows(v), rows(do), rows(dk), rows(dv), masses.window, masses.top_key, terms.share,
            terms.shift, terms.flow, q.shape[1], stream, scale, shape.window, shape.query_heads, shape.key_heads,
            shape.dim, shape.dim_block, shape.value, shape.value_block, c.rows, c.columns,
            shape.merge and shape.relative, shape.compute_dtype, shape.precision, c.stages, **c.launch,
        )  # fmt: skip
    return dk, dv


def window_anchors(
    q: Tensor, keys: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor], own: bool, do: Tensor, masses: Masses,
    terms: RowTerms, scale: float, stream: Stream, shape: Shape,
) -> None:  # fmt: skip
    """Gradients of the anchors; keys: (k, v), which hold them in their first rows (own), or (anchor_k, anchor_v)."""
    c, span, kept = shape.config("anchor"), ANCHOR_SPAN, shape.anchors
    entries = block_count(stream, 0, span)
    make = {"dtype": torch.float32, "device": q.device}
    parts = [torch.empty(entries, shape.key_heads, kept, x.shape[3], **make) for x in keys]
    if entries:
        anchor_kernel[(entries * shape.key_heads,)](
            rows(q), rows(keys[0]), rows(keys[1]), rows(do), *parts, masses.window, masses.top_key, terms.share,
            terms.shift, terms.flow, q.shape[1], stream, scale, shape.window, kept, own, power_of_two(kept),
            shape.query_heads, shape.key_heads, shape.dim, shape.dim_block, shape.value, shape.value_block, span,
            c.rows, shape.merge and shape.relative, shape.compute_dtype, shape.precision, c.stages, **c.launch,
        )  # fmt: skip
    for part, out in zip(parts, grads, strict=True):
        dim = out.shape[3]
        anchor_sum_kernel[((stream.ends - 1) * kept * shape.key_heads,)](
            part, rows(out), stream, kept, own, shape.key_heads, dim, power_of_two(dim), span, num_warps=1
        )
