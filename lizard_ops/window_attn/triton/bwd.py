"""Backward kernel of window attention over its queries."""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import FAR, locate_in_rows, stream_bounds
from lizard_ops.tiles.softcap import cap_slope, capped, units
from lizard_ops.tiles.strided import load_rows, store_rows
from lizard_ops.tiles.sums import add_product


@triton.jit
def score_gradient(
    b_s, b_do, b_v, b_lse, b_term, from_largest, b_dmax, scale_log2, HAS_MAX: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """d scores [rows, columns] of raw scores b_s, -inf where masked; from_largest is 0 at a row's largest score."""
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_term[:, None])
    if HAS_MAX:
        b_ds += tl.where(from_largest == 0, b_dmax[:, None], 0.0)
    return b_ds


@triton.jit(do_not_specialize=["T", "N", "STEPS"])
def window_backward_queries_kernel(
    q, k, v, anchor_k, anchor_v, sinks, first, cu_seqlens, o, lse, arg_max, d_o, d_lse, d_max,
    dq, row_term, d_sink,
    q_sn, q_st, q_sh, k_sn, k_st, k_sh, v_sn, v_st, v_sh, ak_sn, ak_st, ak_sh, av_sn, av_st, av_sh,
    T, N, STEPS, scale, cap,
    HK: tl.constexpr, G: tl.constexpr, HB: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, A: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows and columns as in the forward kernel: dq, each row's term sum(do o) - d lse, and the sink's part.

    With p = exp(s - lse): ds = p (do.v - row term), plus d row max at the largest score.
    """
    SUBS: tl.constexpr = (G + HB - 1) // HB
    i_p = tl.program_id(0)
    i_sub = i_p % SUBS
    i_h = (i_p // SUBS) % HK
    i_n, i_block, bos, length = locate_in_rows(i_p // (SUBS * HK), cu_seqlens, T, N, STEPS, HB, 0, BM, PACKED)
    if i_block * BM >= length * HB:
        return
    i_row = i_n.to(tl.int64)
    if PACKED:
        q += bos * q_st
        k += (bos + i_row * P) * k_st
        v += (bos + i_row * P) * v_st
        o_token = bos
    else:
        q += i_row * q_sn
        k += i_row * k_sn
        v += i_row * v_sn
        o_token = i_row * T
    k += i_h.to(tl.int64) * k_sh
    v += i_h.to(tl.int64) * v_sh
    if CARRIED and A > 0:
        anchor_k += i_row * ak_sn + i_h.to(tl.int64) * ak_sh
        anchor_v += i_row * av_sn + i_h.to(tl.int64) * av_sh
    else:
        anchor_k = k
        anchor_v = v
    shift, low = stream_bounds(first, i_n, A, P, CARRIED)

    o_f = i_block * BM + tl.arange(0, BM)
    o_t = o_f // HB
    o_g = i_sub * HB + o_f % HB
    m_f = (o_t < length) & (o_g < G)
    o_h = i_h * G + o_g
    o_out = (o_token + o_t) * (HK * G) + o_h
    b_q = load_rows(q + o_t.to(tl.int64) * q_st + o_h.to(tl.int64) * q_sh, m_f, D, BD)  # [BM, BD]
    b_do = load_rows(d_o + o_out * V, m_f, V, BV)  # [BM, BV]
    b_o = load_rows(o + o_out * V, m_f, V, BV)
    b_term = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    if HAS_LSE:
        b_term -= tl.load(d_lse + o_out, mask=m_f, other=0.0)
    tl.store(row_term + o_out, b_term, mask=m_f)
    b_lse = tl.load(lse + o_out, mask=m_f, other=0.0)
    if HAS_SINKS:
        b_sink = tl.load(sinks + o_h, mask=m_f, other=0.0).to(tl.float32)
        tl.store(d_sink + o_out, -tl.exp2((b_sink - b_lse) * LOG2E) * b_term, mask=m_f)
    b_lse *= LOG2E
    scale_log2 = units(scale, cap) * LOG2E
    o_r = tl.where(m_f, o_t + P, -FAR)
    b_arg = tl.zeros([BM, 1], tl.int32)
    b_dmax = tl.zeros([BM], tl.float32)
    if HAS_MAX:
        b_arg = tl.load(arg_max + o_out, mask=m_f, other=FAR)[:, None]
        b_dmax = tl.load(d_max + o_out, mask=m_f, other=0.0)

    b_dq = tl.zeros([BM, BD], tl.float32)
    for a in tl.static_range(0, A, BA):
        o_a = a + tl.arange(0, BA)
        m_a = o_a < (A if CARRIED else tl.minimum(length, A))
        b_ka = load_rows(anchor_k + o_a.to(tl.int64) * ak_st, m_a, D, BD)  # [BA, BD]
        b_va = load_rows(anchor_v + o_a.to(tl.int64) * av_st, m_a, V, BV)
        b_sa = capped(tl.dot(b_q, tl.trans(b_ka), input_precision=PRECISION), cap)
        slope_a = cap_slope(b_sa, cap)
        b_sa = tl.where((o_r[:, None] >= (o_a + shift)[None, :]) & m_a[None, :], b_sa, float("-inf"))
        b_dsa = score_gradient(
            b_sa, b_do, b_va, b_lse, b_term, b_arg + 1 + o_a[None, :], b_dmax, scale_log2, HAS_MAX, PRECISION
        )
        b_dq = add_product(b_dq, (b_dsa * slope_a).to(b_ka.dtype), b_ka, m_f[:, None], PRECISION)

    first_row = i_block * BM // HB + P  # stream rows of the first and the last query
    last_row = (i_block * BM + BM - 1) // HB + P
    start = tl.maximum(first_row - W + 1, low)
    stop = tl.minimum(last_row + 1, length + P)
    o_c = tl.arange(0, BN)
    o_k = o_c.to(tl.int64) * k_st
    o_v = o_c.to(tl.int64) * v_st
    for r in range(start, stop, BN):
        r_long = tl.cast(r, tl.int64)
        b_k = load_rows(k + r_long * k_st + o_k, o_c < stop - r, D, BD)  # [BN, BD]
        b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)  # [BM, BN]
        slope = cap_slope(b_s, cap)
        if (r < last_row - W + 1) | (r + BN > first_row + 1):  # not every row sees every column
            distance = o_r[:, None] - (r + o_c)[None, :]
            b_s = tl.where((distance >= 0) & (distance < W), b_s, float("-inf"))
        b_v = load_rows(v + r_long * v_st + o_v, o_c < stop - r, V, BV)  # [BN, BV]
        b_ds = score_gradient(
            b_s, b_do, b_v, b_lse, b_term, b_arg - (r + o_c)[None, :], b_dmax, scale_log2, HAS_MAX, PRECISION
        )
        b_dq = add_product(b_dq, (b_ds * slope).to(b_k.dtype), b_k, m_f[:, None], PRECISION)
    store_rows(dq + o_out * D, b_dq * scale, m_f, D, BD)
