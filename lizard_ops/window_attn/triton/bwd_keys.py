"""Backward of window keys and anchors, for window attention alone and inside hybrid attention."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.tiles.launch import Launch
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import FAR, block_count, locate_in_rows, stream_bounds
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned
from lizard_ops.tiles.softcap import cap_of, cap_slope, capped, units
from lizard_ops.tiles.strided import load_rows, store_rows
from lizard_ops.tiles.sums import add_product
from lizard_ops.window_attn.triton.config import (
    WindowCall,
    WindowNumbers,
    config_for,
    sequences_of,
    shape_arguments,
    strides,
)


class RowStats(NamedTuple):
    """What the keys need to know of each query row; all tensors of one layout, float32 but for the index."""

    lse: Tensor
    term: Tensor
    share: Tensor | None
    arg_max: Tensor | None  # int32
    d_max: Tensor | None
    strides: tuple[int, int, int]  # of a batch row, a token, a head
    to_log2: float  # factor that makes lse a base-2 logarithm


@triton.jit(do_not_specialize=["T", "N", "STEPS", "there_from", "there_less"])
def window_backward_keys_kernel(
    q, k, v, anchor_k, anchor_v, first, cu_seqlens, lengths, d_o, lse, row_term, share, arg_max, d_max,
    dk, dv, part_k, part_v,
    q_sn, q_st, q_sh, k_sn, k_st, k_sh, v_sn, v_st, v_sh, ak_sn, ak_st, ak_sh, av_sn, av_st, av_sh, o_sn, o_st, o_sh,
    row_sn, row_st, row_sh, T, N, STEPS, there_from, there_less, scale, cap, ends,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, A: tl.constexpr, P: tl.constexpr, HB: tl.constexpr, AB: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr,
    BEYOND: tl.constexpr, TO_LOG2: tl.constexpr, TOKENS_FIRST: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BM - AB stream rows of one key head, from the rows (token, query head) that see them.

    The last AB rows of its tile are anchors, for which it leaves the part of the queries that stand at its own stream
    rows, [AB, D] and [AB, V]; with more than AB anchors, further programs have the other anchors alone. Score tiles
    are built keys by queries, so no accumulator is ever transposed. Unless CARRIED, the first A stream rows are the
    anchors and another kernel stores their gradients.

    With w a row's share (1 without) and p = exp(s - lse): dv += w p do, ds = p (w do.v - row term), plus d max at the
    largest score. BEYOND: anchors are window rows like others until the window has left them behind. ADD: dv has
    something already in the stream rows from there_from on, as many as there are tokens less there_less. ends
    [B, HK, P + T]: the row of the first query that no longer sees a key, where that is behind its window; of the
    queries from then on the program takes those that it goes through anyway, up to row i_block KB + KB - 1 + W. Rows
    before the last W of P have no window.
    """
    KB: tl.constexpr = BM - AB
    PARTS: tl.constexpr = (A + AB - 1) // AB if A > 0 else 1
    i_p = tl.program_id(0)
    i_part = i_p % PARTS
    i_h = (i_p // PARTS) % HK
    i_n, i_block, bos, length = locate_in_rows(i_p // (PARTS * HK), cu_seqlens, T, N, STEPS, 1, P, KB, PACKED)
    if lengths is not None:
        length = tl.load(lengths + i_n).to(tl.int32)
    if i_block * KB >= length + P:
        return
    i_row = i_n.to(tl.int64)
    if PACKED:
        q += bos * q_st
        d_o += bos * o_st
        o_row_first = bos * row_st
        o_stream = bos + i_row * P
        k += o_stream * k_st
        v += o_stream * v_st
    else:
        q += i_row * q_sn
        d_o += i_row * o_sn
        k += i_row * k_sn
        v += i_row * v_sn
        o_row_first = i_row * row_sn
        o_stream = i_row * (T + P)
    k += i_h.to(tl.int64) * k_sh
    v += i_h.to(tl.int64) * v_sh
    shift, low = stream_bounds(first, i_n, A, P, CARRIED)
    if BEYOND:
        low = tl.maximum(shift, 0)
        shift += W  # from this row on an anchor is behind the window

    o_i = tl.arange(0, BM)
    o_r = i_block * KB + o_i
    m_r = (o_i + i_part * BM < KB) & (o_r < length + P)
    oldest = o_r  # first and last row that sees the key
    m_open = m_r & (o_r >= low)
    newest = tl.where(m_open, o_r + W - 1, -1)
    if ends is not None:
        p_ends = ends + (bos * 0 + i_h) * T + bos if PACKED else ends + (i_row * HK + i_h) * (T + P)
        newest = tl.maximum(newest, tl.load(p_ends + o_r, mask=m_r, other=0) - 1)
    p_k = k + o_r.to(tl.int64) * k_st
    p_v = v + o_r.to(tl.int64) * v_st
    m_k = m_r
    o_a = i_part * AB + o_i - KB
    m_a = (o_i >= KB) & (o_a < A)
    if A > 0:
        if CARRIED:
            anchor_k += i_row * ak_sn + i_h.to(tl.int64) * ak_sh
            anchor_v += i_row * av_sn + i_h.to(tl.int64) * av_sh
        else:
            anchor_k = k
            anchor_v = v
            m_k = m_k | (m_a & (o_a < length))
        p_k = tl.where(m_a, anchor_k + o_a.to(tl.int64) * ak_st, p_k)
        p_v = tl.where(m_a, anchor_v + o_a.to(tl.int64) * av_st, p_v)
        oldest = tl.where(m_a, tl.maximum(o_a + shift, i_block * KB), oldest)
        newest = tl.where(m_a, i_block * KB + KB - 1, newest)
        o_r = tl.where(m_a, -1 - o_a, o_r)
        if CARRIED:
            m_k = m_k | m_a
    b_k = load_rows(p_k, m_k, D, BD)  # [BM, BD]
    b_v = load_rows(p_v, m_k, V, BV)  # [BM, BV]
    scale_log2 = units(scale, cap) * LOG2E

    # query tiles: BN // HB tokens, HB heads of the group
    TOKENS: tl.constexpr = BN // HB
    SUBS: tl.constexpr = (G + HB - 1) // HB
    o_n = tl.arange(0, BN)
    if TOKENS_FIRST:  # neighbours in a tile are neighbours in the row statistics
        o_g, o_t = o_n // TOKENS, o_n % TOKENS
    else:
        o_g, o_t = o_n % HB, o_n // HB
    o_q = o_t.to(tl.int64) * q_st + o_g.to(tl.int64) * q_sh
    o_row = o_t.to(tl.int64) * row_st + o_g.to(tl.int64) * row_sh
    o_do = o_t.to(tl.int64) * o_st + o_g.to(tl.int64) * o_sh
    q += i_h.to(tl.int64) * G * q_sh
    d_o += i_h.to(tl.int64) * G * o_sh
    o_row_first += i_h.to(tl.int64) * G * row_sh
    b_dk = tl.zeros([BM, BD], tl.float32)
    b_dv = tl.zeros([BM, BV], tl.float32)
    t_start = tl.maximum(i_block * KB - P, 0)
    t_stop = tl.minimum(i_block * KB + KB - 1 + W - P, length)
    for i in range(0, tl.cdiv(t_stop - t_start, TOKENS) * SUBS):
        t = t_start + (i // SUBS) * TOKENS
        g = (i % SUBS) * HB
        m_n = o_t < t_stop - t
        if G % HB > 0:
            m_n = m_n & (o_g < G - g)
        t_long = tl.cast(t, tl.int64)
        g_long = tl.cast(g, tl.int64)
        p_row = o_row_first + t_long * row_st + g_long * row_sh
        b_q = load_rows(q + t_long * q_st + g_long * q_sh + o_q, m_n, D, BD)  # [BN, BD]
        b_do = load_rows(d_o + t_long * o_st + g_long * o_sh + o_do, m_n, V, BV)  # [BN, BV]
        b_lse = tl.load(lse + p_row + o_row, mask=m_n, other=0.0) * TO_LOG2
        b_term = tl.load(row_term + p_row + o_row, mask=m_n, other=0.0)
        b_s = capped(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), cap)  # [BM, BN]
        slope = cap_slope(b_s, cap)
        edge = (t + P < i_block * KB + KB) | (t + TOKENS + P > i_block * KB + W)
        b_s = tl.where((m_open | edge)[:, None], b_s, float("-inf"))  # else the queries see all window rows, no anchor
        if edge:
            o_query = t + P + o_t
            keep = (o_query[None, :] >= oldest[:, None]) & (o_query[None, :] <= newest[:, None])
            b_s = tl.where(keep, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_pv = b_p
        if share is not None:
            b_share = tl.load(share + p_row + o_row, mask=m_n, other=0.0)
            b_dp *= b_share[None, :]
            b_pv = b_p * b_share[None, :]
        b_dv = add_product(b_dv, b_pv.to(b_do.dtype), b_do, m_k[:, None], PRECISION)
        b_ds = b_p * (b_dp - b_term[None, :])
        if d_max is not None:
            b_arg = tl.load(arg_max + p_row + o_row, mask=m_n, other=-FAR)
            b_dmax = tl.load(d_max + p_row + o_row, mask=m_n, other=0.0)
            b_largest = (b_arg[None, :] == o_r[:, None]) & (b_p > 0.0)
            b_ds += tl.where(b_largest, b_dmax[None, :], 0.0)
        b_dk = add_product(b_dk, (b_ds * slope).to(b_q.dtype), b_q, m_k[:, None], PRECISION)

    b_dk *= scale
    if A > 0:
        o_part = (i_p // PARTS).to(tl.int64) * A + o_a
        store_rows(part_k + o_part * D, b_dk, m_a, D, BD)
        store_rows(part_v + o_part * V, b_dv, m_a, V, BV)
        if not CARRIED and not BEYOND:
            m_r = m_r & (o_r >= A)
    o_out = (o_stream + o_r) * HK + i_h
    store_rows(dk + o_out * D, b_dk, m_r, D, BD)
    if ADD:
        m_there = m_r & (o_r >= there_from) & (o_r - there_from < length - there_less)
        b_dv += load_rows(dv + o_out * V, m_there, V, BV).to(tl.float32)
    store_rows(dv + o_out * V, b_dv, m_r, V, BV)


@triton.jit(do_not_specialize=["T", "N"])
def window_backward_anchors_kernel(
    part, cu_seqlens, lengths, dx, T, N,
    HK: tl.constexpr, DIM: tl.constexpr, A: tl.constexpr, P: tl.constexpr, KB: tl.constexpr, BR: tl.constexpr,
    BX: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of one anchor of one key head, the sum of what its sequence's key blocks left.

    It goes to dx [N, A, HK, DIM] when CARRIED, else to the first rows of the sequence in dx [.., HK, DIM], to what
    stands there with ADD.
    """
    i_p = tl.program_id(0)
    i_a = i_p % A
    i_h = (i_p // A) % HK
    i_n = i_p // (A * HK)
    if PACKED:
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        block = (bos + i_n * P) // KB + i_n
    else:
        length = T
        bos = i_n.to(tl.int64) * T
        block = i_n.to(tl.int64) * tl.cdiv(T + P, KB)
        if lengths is not None:
            length = tl.load(lengths + i_n).to(tl.int32)
    if CARRIED:
        o_out = i_n.to(tl.int64) * A + i_a
    else:
        o_out = bos + i_a
        if i_a >= length:
            return
    o_x = tl.arange(0, BX)
    b_sum = tl.zeros([BR, BX], tl.float32)
    blocks = tl.cdiv(length + P, KB)
    for r in range(0, blocks, BR):
        o_r = r + tl.arange(0, BR)
        mask = (o_r < blocks)[:, None] & (o_x < DIM)[None, :]
        p_part = part + (((block + o_r) * HK + i_h) * A + i_a)[:, None] * DIM + o_x[None, :]
        b_sum += tl.load(p_part, mask=mask, other=0.0)
    b_x = tl.sum(b_sum, 0)
    p_dx = dx + (o_out * HK + i_h) * DIM + o_x
    if ADD:
        b_x += tl.load(p_dx, mask=o_x < DIM, other=0.0).to(tl.float32)
    tl.store(p_dx, b_x.to(dx.dtype.element_ty), mask=o_x < DIM)


def key_block(config: Launch, anchors: int) -> int:
    """Keys of a block, whose tile has anchors in its other rows."""
    return config.rows - min(anchors, config.rows // 2)


def key_gradients(
    x: WindowCall, numbers: WindowNumbers, d_o: Tensor, stats: RowStats, beyond: bool,
    there: tuple[Tensor, int, int] | None = None, ends: Tensor | None = None, plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dk, dv, d anchor_k, d anchor_v); the last two are empty unless anchors are kept apart (``first`` given).

    Of right-padded rows (``lengths``) gradients past the end are left unwritten. beyond: see the kernel. there: a dv to
    add to, its first stream row that holds something, and by how many rows fewer than tokens there are. ends: see the
    kernel. plan: of a known kind of call.
    """
    q, k, v, first, cu_seqlens, lengths = x.q, x.k, x.v, x.first, x.cu_seqlens, x.lengths
    anchors, prefix, scale = numbers.anchors, numbers.prefix, numbers.scale
    (_, length, heads, dim), (key_heads, v_dim) = q.shape, v.shape[2:]
    n, packed, carried = sequences_of(q, cu_seqlens), cu_seqlens is not None, first is not None
    dv, there_from, there_less = there or (v.new_empty(v.shape), 0, 0)
    dk = k.new_empty(k.shape)
    dka, dva = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x.anchor_k, x.anchor_v))
    config = config_for("keys", q, v, heads // key_heads)
    size = key_block(config, anchors)
    kept = config.rows - size
    blocks = block_count(length, n, prefix, size, packed) * key_heads
    part_k, part_v = (stats.lse.new_empty(blocks, anchors, size) for size in (dim, v_dim))
    tensors = (
        q, k, v, x.anchor_k, x.anchor_v, first, cu_seqlens, lengths, d_o, stats.lse, stats.term, stats.share,
        stats.arg_max, stats.d_max, dk, dv, part_k, part_v,
    )  # fmt: skip

    def arguments() -> Arguments:
        args = (
            *tensors, *x.strides, *strides(d_o), *stats.strides, length, n, (n - 1).bit_length(), there_from,
            there_less, scale, cap_of(scale, numbers.softcap), ends,
        )  # fmt: skip
        named = {
            "HB": config.heads, "AB": kept, "PACKED": packed, "CARRIED": carried, "BEYOND": beyond,
            "ADD": there is not None, "TO_LOG2": stats.to_log2, "TOKENS_FIRST": stats.strides[1] == 1,
        }  # fmt: skip
        return blocks * max(1, cdiv(anchors, max(kept, 1))), args, named | shape_arguments(x, numbers, config)

    if blocks:
        launch_planned(plan, "window keys", window_backward_keys_kernel, (*tensors, ends), arguments)
    for name, part, out in (("keys", part_k, dka if carried else dk), ("values", part_v, dva if carried else dv)):

        def of_anchors(part: Tensor = part, out: Tensor = out) -> Arguments:
            named = {
                "HK": key_heads, "DIM": part.shape[2], "A": anchors, "P": prefix, "KB": size, "BR": 64,
                "BX": power_of_2(part.shape[2]), "PACKED": packed, "CARRIED": carried, "ADD": beyond and not carried,
            }  # fmt: skip
            return n * key_heads * anchors, (part, cu_seqlens, lengths, out, length, n), named

        if anchors and blocks:
            known = (part, cu_seqlens, lengths, out)
            launch_planned(plan, f"anchors' {name}", window_backward_anchors_kernel, known, of_anchors)
    return dk, dv, dka, dva
