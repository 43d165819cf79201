"""A step of the scores in one kernel, and in another what keys receive in the window.

``score_kernel`` has a program for each sequence, which goes through its key heads: they share the sums over inputs.
``received_kernel`` has one for each sequence and key head, and runs behind it. Every load of a number of the state
precedes the barrier before its store, for where a tile is smaller than the program several threads hold each number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.tiles.softcap import capped
from lizard_ops.tiles.strided import load_rows


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def at_least(x, bound):
    """The larger of both; NaN stays."""
    return tl.where(x < bound, bound, x)


@triton.jit
def larger(x, y):
    """The larger of both, NaN where one is."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def score_kernel(
    sums, k, v, inner_bias, outer_weight, linear_weight, bias, position, inner, linear, key_sum, scores, statistics,
    sums_sn, k_sn, k_sh, v_sn, v_sh, least,
    S: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """scores [N, HK]: of the key two tokens before but for what it received; statistics [N, HK, 3] of the new key."""
    i_n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BS)
    m_s = o_s < S
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BV)
    sums += i_n * sums_sn
    inner += i_n * (3 * S)
    linear += i_n * (2 * HK)
    p = tl.load(position + i_n)
    b_one = tl.load(sums + o_s, mask=m_s, other=0.0)
    b_two = tl.load(inner + 2 * S + o_s, mask=m_s, other=0.0) + tl.load(sums + S + o_s, mask=m_s, other=0.0)
    b_three = tl.load(inner + S + o_s, mask=m_s, other=0.0) + tl.load(sums + 2 * S + o_s, mask=m_s, other=0.0)
    b_four = tl.load(inner + o_s, mask=m_s, other=0.0) + tl.load(sums + 3 * S + o_s, mask=m_s, other=0.0)
    b_inner = gelu(b_four + tl.load(inner_bias + o_s, mask=m_s, other=0.0))
    for h in range(0, HK, BH):
        o_h = h + tl.arange(0, BH)
        m_h = o_h < HK
        m_d = m_h[:, None] & (o_d < D)[None, :]
        m_v = m_h[:, None] & (o_v < V)[None, :]
        b_k = tl.load(k + i_n * k_sn + (o_h * k_sh)[:, None] + o_d[None, :], mask=m_d, other=0.0).to(tl.float32)
        b_v = tl.load(v + i_n * v_sn + (o_h * v_sh)[:, None] + o_v[None, :], mask=m_v, other=0.0).to(tl.float32)
        p_sum = key_sum + ((i_n * HK + o_h) * D)[:, None] + o_d[None, :]
        b_norm = at_least(tl.sqrt_rn(tl.sum(b_k * b_k, 1)), least)  # [BH]
        b_unit = tl.div_rn(b_k, b_norm[:, None])
        b_sum = tl.load(p_sum, mask=m_d, other=0.0) + b_unit.to(tl.float64)
        b_mean = b_sum.to(tl.float32)
        b_length = at_least(tl.sqrt_rn(tl.sum(b_mean * b_mean, 1)), least)
        b_like = tl.sum(b_unit * (b_mean / b_length[:, None]), 1)
        b_key = tl.log(b_norm)
        b_value = tl.log(at_least(tl.sqrt_rn(tl.sum(b_v * b_v, 1)), least))
        p_a = linear_weight + o_h * 3
        b_linear = b_key * tl.load(p_a, mask=m_h, other=0.0) + b_value * tl.load(p_a + 1, mask=m_h, other=0.0)
        b_linear += b_like * tl.load(p_a + 2, mask=m_h, other=0.0)
        b_known = tl.load(linear + o_h, mask=m_h, other=0.0)
        b_next = tl.load(linear + HK + o_h, mask=m_h, other=0.0)
        p_u = outer_weight + (o_h * S)[:, None] + o_s[None, :]
        b_u = tl.load(p_u, mask=m_h[:, None] & m_s[None, :], other=0.0)
        b_score = tl.sum(b_u * b_inner[None, :], 1) + b_known + tl.load(bias + o_h, mask=m_h, other=0.0)
        tl.debug_barrier()
        tl.store(p_sum, b_sum, mask=m_d)
        tl.store(linear + o_h, b_next, mask=m_h)
        tl.store(linear + HK + o_h, b_linear, mask=m_h)
        tl.store(scores + i_n * HK + o_h, tl.where(p >= 2, b_score, 0.0), mask=m_h)
        if statistics is not None:
            p_facts = statistics + (i_n * HK + o_h) * 3
            tl.store(p_facts, b_key, mask=m_h)
            tl.store(p_facts + 1, b_value, mask=m_h)
            tl.store(p_facts + 2, b_like, mask=m_h)
    tl.debug_barrier()
    tl.store(inner + o_s, b_three, mask=m_s)
    tl.store(inner + S + o_s, b_two, mask=m_s)
    tl.store(inner + 2 * S + o_s, b_one, mask=m_s)
    tl.store(position + i_n, p + 1)


@triton.jit
def absorb_mass(b_s, b_m, b_l, scale_log2):
    """Running maximum and mass [rows] with scores [rows, keys], -inf where a key is hidden."""
    b_top = tl.maximum(b_m, tl.max(b_s, 1))
    b_l = b_l * tl.exp2((b_m - b_top) * scale_log2) + tl.sum(tl.exp2((b_s - b_top[:, None]) * scale_log2), 1)
    return b_top, b_l


@triton.jit
def window_scores(
    b_q, ring_k, ring_sw, c, slot, newest, cap,
    D: tl.constexpr, W: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(scores [BG, BN] with the keys in places c on, -inf where hidden; which are seen; tokens between)."""
    o_w = c + tl.arange(0, BN)
    age = slot - 1 - o_w
    age = tl.where(age < 0, age + W, age)
    seen = (o_w < W) & (age < tl.minimum(newest, W - 1))
    b_k = load_rows(ring_k + o_w.to(tl.int64) * ring_sw, o_w < W, D, BD).to(b_q.dtype)  # [BN, BD]
    b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
    return tl.where(seen[None, :], b_s, float("-inf")), seen, age


@triton.jit
def received_kernel(
    q, new_k, ring_k, anchor_k, position, ring, statistics, scores, mean, deviation, inner_weight, inner_bias,
    outer_weight, q_sn, q_sh, k_sn, k_sh, ring_sn, ring_sw, ring_sh, anchor_sn, anchor_sa, anchor_sh, scale_log2, cap,
    least,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, W: tl.constexpr, A: tl.constexpr, STRIDE: tl.constexpr,
    U: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr,
    SAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The ring of one sequence and key head after its token, and in place of ``score_kernel``'s score the whole one.

    Seven numbers a place: three statistics, the score without the term, sum, late sum and maximum of what was received.
    A place changes when its key comes, when its score is known, and with a query that counts; others cost nothing.
    """
    i_h = tl.program_id(0) % HK
    i_n = (tl.program_id(0) // HK).to(tl.int64)
    p = tl.load(position + i_n) - 1  # ``score_kernel`` has counted the token
    slot = (p % W).to(tl.int32)
    newest = tl.minimum(p, 1 << 30).to(tl.int32)
    p_score = scores + i_n * HK + i_h
    b_base = tl.load(p_score)
    p_facts = statistics + (i_n * HK + i_h) * 3
    b_key, b_value, b_like = tl.load(p_facts), tl.load(p_facts + 1), tl.load(p_facts + 2)
    ring += (i_n * W * HK + i_h) * 7
    leaving = tl.where(slot + 1 < W, slot + 1, 0)
    waiting = tl.where(slot < 2, slot + W - 2, slot - 2)
    p_old = ring + leaving * (HK * 7)
    old_key, old_value, old_like, old_base = (
        tl.load(p_old), tl.load(p_old + 1), tl.load(p_old + 2), tl.load(p_old + 3)
    )  # fmt: skip
    old_base = tl.where(leaving == waiting, b_base, old_base)
    total, late, largest = tl.load(p_old + 4), tl.load(p_old + 5), tl.load(p_old + 6)

    if (p + 1) % STRIDE == 0:
        ring_k += i_n * ring_sn + i_h * ring_sh
        o_g = tl.arange(0, BG)
        m_g = o_g < G
        b_q = load_rows(q + i_n * q_sn + (i_h * G + o_g).to(tl.int64) * q_sh, m_g, D, BD)  # [BG, BD]
        if not SAME:
            b_q = b_q.to(tl.float32)
        o_a = tl.arange(0, BA)  # the anchors that have left the window, and the new key
        m_a = (o_a == A) | ((o_a < A) & (o_a <= newest - W))
        p_k = new_k + i_n * k_sn + i_h * k_sh + o_a * 0
        if A > 0:
            p_k = tl.where(o_a < A, anchor_k + i_n * anchor_sn + i_h * anchor_sh + o_a.to(tl.int64) * anchor_sa, p_k)
        b_ka = load_rows(p_k, m_a, D, BD).to(b_q.dtype)  # [BA, BD]
        b_near = capped(tl.dot(b_q, tl.trans(b_ka), input_precision=PRECISION), cap)
        b_near = tl.where(m_a[None, :], b_near, float("-inf"))
        b_m = tl.max(b_near, 1)
        b_l = tl.sum(tl.exp2((b_near - b_m[:, None]) * scale_log2), 1)
        for c in range(0, W, BN):
            b_s, _, _ = window_scores(b_q, ring_k, ring_sw, c, slot, newest, cap, D, W, BN, BD, PRECISION)
            b_m, b_l = absorb_mass(b_s, b_m, b_l, scale_log2)
        for c in range(0, W, BN):
            b_s, seen, age = window_scores(b_q, ring_k, ring_sw, c, slot, newest, cap, D, W, BN, BD, PRECISION)
            b_share = tl.exp2((b_s - b_m[:, None]) * scale_log2) / b_l[:, None]
            b_share = tl.where(m_g[:, None], b_share, 0.0)
            b_total = tl.sum(b_share, 0)  # [BN]
            b_most = tl.max(b_share, 0)
            o_w = c + tl.arange(0, BN)
            counted = seen & (age + 1 >= 2)
            p_sums = ring + o_w * (HK * 7) + 4
            old_total = tl.load(p_sums, mask=counted, other=0.0)
            old_late = tl.load(p_sums + 1, mask=counted, other=0.0)
            old_most = tl.load(p_sums + 2, mask=counted, other=0.0)
            tl.debug_barrier()
            tl.store(p_sums, old_total + b_total, mask=counted)
            tl.store(p_sums + 1, old_late + b_total, mask=counted & (age + 1 >= W * 3 // 4))
            tl.store(p_sums + 2, larger(old_most, b_most), mask=counted)
            left = counted & (o_w == leaving)
            total += tl.sum(tl.where(left, b_total, 0.0), 0)
            late += tl.sum(tl.where(left, b_total, 0.0), 0)  # it has long been late
            largest = larger(largest, tl.sum(tl.where(left, b_most, 0.0), 0))

    o_u = tl.arange(0, BU)
    m_u = o_u < U
    mean += i_h * 6
    deviation += i_h * 6
    b_plain = tl.load(inner_bias + i_h * U + o_u, mask=m_u, other=0.0)
    for f in tl.static_range(6):
        if f == 0:
            fact = old_key
        elif f == 1:
            fact = old_value
        elif f == 2:
            fact = old_like
        elif f == 3:
            fact = tl.log(at_least(total, least))
        elif f == 4:
            fact = tl.log(at_least(late, least))
        else:
            fact = tl.log(at_least(largest, least))
        fact = (fact - tl.load(mean + f)) / tl.load(deviation + f)
        b_plain += fact * tl.load(inner_weight + (i_h * 6 + f) * U + o_u, mask=m_u, other=0.0)
    b_outer = tl.load(outer_weight + i_h * U + o_u, mask=m_u, other=0.0)
    b_score = old_base + tl.sum(gelu(b_plain) * b_outer, 0)
    tl.debug_barrier()
    tl.store(p_score, tl.where(p >= W - 1, b_score, 0.0))
    tl.store(ring + waiting * (HK * 7) + 3, b_base)
    p_new = ring + slot * (HK * 7)
    tl.store(p_new, b_key)
    tl.store(p_new + 1, b_value)
    tl.store(p_new + 2, b_like)
    for i in tl.static_range(3, 7):
        tl.store(p_new + i, 0.0)
