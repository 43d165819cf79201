"""Forward kernel of window attention: an online softmax over anchors and window columns."""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.tiles.log2 import LN2
from lizard_ops.tiles.places import FAR, locate_in_rows, stream_bounds
from lizard_ops.tiles.softcap import capped
from lizard_ops.tiles.strided import load_rows, store_rows


@triton.jit
def scaled_above(score, top, scale, PRECISION: tl.constexpr):
    """scale * (score - top) of a tile [rows, columns]: for 16-bit inputs one fused operation, which rounds scale * top.

    Float32 takes the difference first: at scores of 1e4 that rounding is larger than those of two nearly equal scores.
    """
    if PRECISION == "ieee":
        return (score - top[:, None]) * scale
    else:
        return score * scale - (top * scale)[:, None]


@triton.jit
def absorb(
    b_s, b_v, b_m, b_l, b_o, b_arg, column, step, scale_log2, WITH_MAX: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One tile of the online softmax: raw scores b_s [rows, columns], their columns numbered from ``column``."""
    if WITH_MAX:
        top, index = tl.max(b_s, 1, return_indices=True)
        b_arg = tl.where(top > b_m, column + step * index, b_arg)
    else:
        top = tl.max(b_s, 1)
    b_new = tl.maximum(b_m, top)
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(scaled_above(b_s, b_safe, scale_log2, PRECISION))
    b_shrink = tl.exp2((b_m - b_safe) * scale_log2)  # one where no larger score came, whatever is fused
    b_l = b_l * b_shrink + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_shrink[:, None], input_precision=PRECISION)
    return b_new, b_l, b_o, b_arg


@triton.jit(do_not_specialize=["T", "N", "STEPS"])
def window_forward_kernel(
    q, k, v, anchor_k, anchor_v, sinks, first, cu_seqlens, o, lse, spread, arg_max,
    q_sn, q_st, q_sh, k_sn, k_st, k_sh, v_sn, v_st, v_sh, ak_sn, ak_st, ak_sh, av_sn, av_st, av_sh,
    T, N, STEPS, scale_log2, cap,
    HK: tl.constexpr, G: tl.constexpr, HB: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, A: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr, HAS_SINKS: tl.constexpr,
    WITH_MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows (token, query head of the group), token-major, of one key head.

    The key stream of a sequence holds P rows before its T tokens: query t stands at row t + P. cap: see ``capped``.
    """
    SUBS: tl.constexpr = (G + HB - 1) // HB
    i_p = tl.program_id(0)
    i_sub = i_p % SUBS
    i_h = (i_p // SUBS) % HK
    i_n, i_block, bos, length = locate_in_rows(i_p // (SUBS * HK), cu_seqlens, T, N, STEPS, HB, 0, BM, PACKED)
    if i_block * BM >= length * HB:
        return
    i_row = i_n.to(tl.int64)
    if PACKED:  # one row of tokens, each sequence behind the prefixes of those before it
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
    b_q = load_rows(q + o_t.to(tl.int64) * q_st + o_h.to(tl.int64) * q_sh, m_f, D, BD)  # [BM, BD]
    o_r = tl.where(m_f, o_t + P, -FAR)

    first_row = i_block * BM // HB + P  # stream rows of the first and the last query
    last_row = (i_block * BM + BM - 1) // HB + P
    start = tl.maximum(first_row - W + 1, low)
    stop = tl.minimum(last_row + 1, length + P)
    b_m = tl.full([BM], float("-inf"), tl.float32)  # raw scores, not yet times the scale
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BV], tl.float32)
    b_arg = tl.zeros([BM], tl.int32)
    for a in tl.static_range(0, A, BA):
        o_a = a + tl.arange(0, BA)
        m_a = o_a < (A if CARRIED else tl.minimum(length, A))
        b_ka = load_rows(anchor_k + o_a.to(tl.int64) * ak_st, m_a, D, BD)  # [BA, BD]
        b_va = load_rows(anchor_v + o_a.to(tl.int64) * av_st, m_a, V, BV)
        b_sa = capped(tl.dot(b_q, tl.trans(b_ka), input_precision=PRECISION), cap)
        b_sa = tl.where((o_r[:, None] >= (o_a + shift)[None, :]) & m_a[None, :], b_sa, float("-inf"))
        b_m, b_l, b_o, b_arg = absorb(b_sa, b_va, b_m, b_l, b_o, b_arg, -1 - a, -1, scale_log2, WITH_MAX, PRECISION)

    o_c = tl.arange(0, BN)
    o_k = o_c.to(tl.int64) * k_st
    o_v = o_c.to(tl.int64) * v_st
    for r in range(start, stop, BN):
        r_long = tl.cast(r, tl.int64)
        b_k = load_rows(k + r_long * k_st + o_k, o_c < stop - r, D, BD)  # [BN, BD]
        b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
        if (r < last_row - W + 1) | (r + BN > first_row + 1):  # not every row sees every column
            distance = o_r[:, None] - (r + o_c)[None, :]
            b_s = tl.where((distance >= 0) & (distance < W), b_s, float("-inf"))
        b_v = load_rows(v + r_long * v_st + o_v, o_c < stop - r, V, BV)  # [BN, BV]
        b_m, b_l, b_o, b_arg = absorb(b_s, b_v, b_m, b_l, b_o, b_arg, r, 1, scale_log2, WITH_MAX, PRECISION)

    o_out = (o_token + o_t) * (HK * G) + o_h
    b_m = b_m * scale_log2
    b_l = tl.where(m_f, b_l, 1.0)
    b_gain = tl.zeros([BM], tl.float32)
    if HAS_SINKS:
        b_sink = tl.load(sinks + o_h, mask=m_f, other=0.0).to(tl.float32) / LN2
        b_gain = tl.maximum(b_sink - b_m, 0.0)  # where a sink is the largest term
        b_new = tl.maximum(b_m, b_sink)
        b_shrink = tl.exp2(b_m - b_new)
        b_l = b_l * b_shrink + tl.exp2(b_sink - b_new)
        b_o = b_o * b_shrink[:, None]
        b_m = b_new
    store_rows(o + o_out * V, b_o / b_l[:, None], m_f, V, BV)
    tl.store(lse + o_out, (b_m + tl.log2(b_l)) * LN2, mask=m_f)
    if WITH_MAX:
        tl.store(spread + o_out, (b_gain + tl.log2(b_l)) * LN2, mask=m_f)
        tl.store(arg_max + o_out, b_arg, mask=m_f)
