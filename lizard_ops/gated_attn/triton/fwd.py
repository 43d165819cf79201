"""Output kernel for no gate and for gates that are one number per head."""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.gated_attn.triton.state import locate_pairs, only_if, state_tile, tile


@triton.jit
def decay_row(g_hi, g_lo, rows, valid, hg, HG: tl.constexpr):
    """Both halves of the local gate sums at the given rows; 0 outside."""
    p = rows * HG + hg
    return tl.load(g_hi + p, mask=valid, other=0.0), tl.load(g_lo + p, mask=valid, other=0.0)


@triton.jit
def decay_tile(g_hi, g_lo, ri, rj, i_ok, j_ok, causal, hg, HG: tl.constexpr):
    """exp(G_i - G_j) [queries, keys], 0 where query i does not see key j."""
    gi, gi_lo = decay_row(g_hi, g_lo, ri, i_ok, hg, HG)
    gj, gj_lo = decay_row(g_hi, g_lo, rj, j_ok, hg, HG)
    d = (gi[:, None] - gj[None, :]) + (gi_lo[:, None] - gj_lo[None, :])
    return tl.where(causal, tl.exp2(d), 0.0)


@triton.jit
def log_of(den):
    """log den, -inf at 0."""
    return tl.where(den == 0, float("-inf"), tl.log(tl.where(den == 0, 1.0, den)))


@triton.jit
def output_kernel(
    q, k, v, g_hi, g_lo, states, z_states, o, log_mass, mass, table, owner, scale, q_rows, k_rows, q_shift, k_shift,
    pairs,
    HQ: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, GH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
    NORMALIZE: tl.constexpr, ABSORBED: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o_i = (exp(G_i) q_i S + sum_{j<=i} q_i.k_j exp(G_i - G_j) v_j) / mass_i for a chunk's queries of one state head.

    GH query heads are stacked as rows of one tile [GH*C, .], so k, v and S are read once per group. ABSORBED multiplies
    the features by exp(G_i) and exp(-G_j) instead of the scores by exp(G_i - G_j): sound within a bound on G only.
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    GS: tl.constexpr = HQ // HS
    BM: tl.constexpr = GH * C
    pid = tl.program_id(0)
    vb = pid % NVB
    hs = (pid // NVB) % HS
    chunk = pid // (NVB * HS)
    n, q0, k0, rows = locate_pairs(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    q += q0 * (HQ * K)
    o += q0 * (HQ * V)
    mass += q0 * HQ
    log_mass += q0 * HQ
    k += k0 * (HK * K)
    v += k0 * (HK * V)
    if GATED:
        g_hi += k0 * HG
        g_lo += k0 * HG
    hk = hs * HK // HS
    hg = hs * HG // HS
    state = (chunk * HS + hs).to(tl.int64)

    o_m = tl.arange(0, BM)
    ri = o_m % C
    rj = tl.arange(0, C)
    i_ok = ri < rows
    j_ok = rj < rows
    causal = (ri[:, None] >= rj[None, :]) & j_ok[None, :]  # [BM, C]
    if GATED:
        gi, gi_lo = decay_row(g_hi, g_lo, ri, i_ok, hg, HG)
        from_start = tl.exp2(gi) * tl.exp2(gi_lo)
    if ABSORBED:
        gj, gj_lo = decay_row(g_hi, g_lo, rj, j_ok, hg, HG)
        to_key = tl.exp2(-gj) * tl.exp2(-gj_lo)
    if GATED and not ABSORBED:
        weight = decay_tile(g_hi, g_lo, ri, rj, i_ok, j_ok, causal, hg, HG)
    else:
        weight = causal.to(tl.float32)

    vp, vm = tile(v, rj, j_ok, hk, HK, V, vb * BV, BV)
    v_t = tl.load(vp, mask=vm, other=0.0)  # [C, BV]
    if NKB == 1:
        kp, km = tile(k, rj, j_ok, hk, HK, K, 0, BK)
        k_t = tl.load(kp, mask=km, other=0.0)  # [C, BK]
        if ABSORBED:
            k_t = (k_t.to(tl.float32) * to_key[:, None]).to(OPERAND)
        sp, sm = state_tile(states, state, K, V, 0, vb * BV, BK, BV)
        s_t = tl.load(sp, mask=sm, other=0.0)  # [BK, BV]
        ks = tl.arange(0, BK)
        z_t = tl.load(z_states + state * K + ks, mask=ks < K, other=0.0)

    for step in range(0, (GS + GH - 1) // GH):
        head = step * GH + o_m // C
        ok = i_ok & (head < GS)
        head = hs * GS + head
        for kb in tl.static_range(NKB):
            if NKB > 1:
                kp, km = tile(k, rj, j_ok, hk, HK, K, kb * BK, BK)
                k_t = tl.load(kp, mask=km, other=0.0)
                if ABSORBED:
                    k_t = (k_t.to(tl.float32) * to_key[:, None]).to(OPERAND)
                sp, sm = state_tile(states, state, K, V, kb * BK, vb * BV, BK, BV)
                s_t = tl.load(sp, mask=sm, other=0.0)
                ks = kb * BK + tl.arange(0, BK)
                z_t = tl.load(z_states + state * K + ks, mask=ks < K, other=0.0)
            qp, qm = tile(q, ri, ok, head, HQ, K, kb * BK, BK)
            q_t = tl.load(qp, mask=qm, other=0.0)  # [BM, BK]
            if ABSORBED:
                q_t = (q_t.to(tl.float32) * from_start[:, None]).to(OPERAND)
            zi = tl.sum(q_t.to(tl.float32) * z_t[None, :], 1)
            if kb == 0:
                score = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION)
                acc = tl.dot(q_t.to(OPERAND), s_t, input_precision=PRECISION)
                den = zi
            else:
                score = tl.dot(q_t, tl.trans(k_t), score, input_precision=PRECISION)
                acc = tl.dot(q_t.to(OPERAND), s_t, acc, input_precision=PRECISION)
                den += zi
        if GATED and not ABSORBED:
            den *= from_start
            acc *= from_start[:, None]
        p = score * weight
        den += tl.sum(p, 1)
        acc = tl.dot(p.to(OPERAND), v_t.to(OPERAND), acc, input_precision=PRECISION)
        if NORMALIZE:
            acc *= tl.where(den != 0, 1.0 / den, 0.0)[:, None]
        else:
            acc *= scale
        op, om = tile(o, ri, ok, head, HQ, V, vb * BV, BV)
        tl.store(op, acc.to(o.dtype.element_ty), mask=om)
        den *= scale
        first = only_if(vb == 0, ok)
        m_p = ri * HQ + head
        tl.store(mass + m_p, den, mask=first)
        tl.store(log_mass + m_p, log_of(den), mask=first)
