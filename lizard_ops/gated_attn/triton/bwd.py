"""Gradient kernels for no gate and for gates that are one number per head.

With the row weight w_i and the row term e_i of the normaliser,

    dA_ij = w_i do_i.v_j + e_i = w_i (do_i.v_j - m_i) + l_i
    normalised: w = 1 / den, e = (d log_mass - do.o) / den; otherwise w = scale, e = d log_mass / den

where the second form, with m = do.o if normalised, otherwise 0, and l = d log_mass / den, keeps the digits of a row
whose mass is nearly all one key's,
the row kernel gives dq, the key kernel dk, dv and dg. The gradient of gate t is the sum of a_ij dA_ij over j < t <= i.
It is taken apart by chunk, so that no long running sum has to cancel: both inside the chunk; j before; i after; both
outside.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.gated_attn.triton.fwd import decay_row, decay_tile
from lizard_ops.gated_attn.triton.state import locate_pairs, only_if, state_tile, tile


@triton.jit
def row_weights(mass, ptrs, valid, scale, NORMALIZE: tl.constexpr):
    """w of the rows at ``ptrs``; 0 where nothing was attended."""
    if NORMALIZE:
        den = tl.load(mass + ptrs, mask=valid, other=0.0)
        return tl.where(den != 0, scale / den, 0.0)
    else:
        return tl.where(valid, scale, 0.0)


@triton.jit
def row_levels(d_log_mass, mass, ptrs, valid, scale):
    """l of the rows at ``ptrs``; 0 where nothing was attended or no log mass was used."""
    den = tl.load(mass + ptrs, mask=valid, other=0.0)
    dlm = tl.load(d_log_mass + ptrs, mask=valid, other=0.0)
    return tl.where((dlm != 0) & (den != 0), dlm * (scale / den), 0.0)


@triton.jit
def row_mean(mass, ptrs, valid, delta, scale, NORMALIZE: tl.constexpr):
    """m of the rows at ``ptrs``; delta = do.o * den."""
    if NORMALIZE:
        den = tl.load(mass + ptrs, mask=valid, other=0.0)
        return tl.where(den != 0, tl.div_rn(delta, tl.where(den != 0, den, 1.0)) * scale, 0.0)
    else:
        return delta * 0.0


@triton.jit
def row_kernel(
    q, k, v, g_hi, g_lo, states, z_states, d_o, mass, d_log_mass, dq, extra, means, row_dot, table, owner, scale,
    q_rows, k_rows, q_shift, k_shift, pairs, row_total,
    HQ: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, GH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one chunk and one state head's queries, the row terms e and m, and q_i.dq_i through the state (for dg)."""
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    GS: tl.constexpr = HQ // HS
    BM: tl.constexpr = GH * C
    pid = tl.program_id(0)
    kb = pid % NKB
    hs = (pid // NKB) % HS
    chunk = pid // (NKB * HS)
    n, q0, k0, rows = locate_pairs(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    q += q0 * (HQ * K)
    dq += q0 * (HQ * K)
    d_o += q0 * (HQ * V)
    mass += q0 * HQ
    d_log_mass += q0 * HQ
    extra += q0 * HQ
    means += q0 * HQ
    k += k0 * (HK * K)
    v += k0 * (HK * V)
    if GATED:
        g_hi += k0 * HG
        g_lo += k0 * HG
        row_dot += q0 * HQ
    hk = hs * HK // HS
    hg = hs * HG // HS
    state = (chunk * HS + hs).to(tl.int64)

    o_m = tl.arange(0, BM)
    ri = o_m % C
    rj = tl.arange(0, C)
    i_ok = ri < rows
    j_ok = rj < rows
    causal = (ri[:, None] >= rj[None, :]) & j_ok[None, :]
    if GATED:
        gi, _ = decay_row(g_hi, g_lo, ri, i_ok, hg, HG)
        from_start = tl.exp2(gi)
        weight = decay_tile(g_hi, g_lo, ri, rj, i_ok, j_ok, causal, hg, HG)
    else:
        weight = causal.to(tl.float32)

    kp, km = tile(k, rj, j_ok, hk, HK, K, kb * BK, BK)
    k_t = tl.load(kp, mask=km, other=0.0)  # [C, BK]
    ks = kb * BK + tl.arange(0, BK)
    z_t = tl.load(z_states + state * K + ks, mask=ks < K, other=0.0)
    if NVB == 1:
        vp, vm = tile(v, rj, j_ok, hk, HK, V, 0, BV)
        v_t = tl.load(vp, mask=vm, other=0.0)  # [C, BV]
        if NKB == 1:
            sp, sm = state_tile(states, state, K, V, kb * BK, 0, BK, BV)
            s_t = tl.load(sp, mask=sm, other=0.0)  # [BK, BV]

    for step in range(0, (GS + GH - 1) // GH):
        head = step * GH + o_m // C
        ok = i_ok & (head < GS)
        head = hs * GS + head
        for vb in tl.static_range(NVB):
            if NVB > 1:
                vp, vm = tile(v, rj, j_ok, hk, HK, V, vb * BV, BV)
                v_t = tl.load(vp, mask=vm, other=0.0)
                if NKB == 1:
                    sp, sm = state_tile(states, state, K, V, kb * BK, vb * BV, BK, BV)
                    s_t = tl.load(sp, mask=sm, other=0.0)
            dop, om = tile(d_o, ri, ok, head, HQ, V, vb * BV, BV)
            do_t = tl.load(dop, mask=om, other=0.0)  # [BM, BV]
            if vb == 0:
                d_score = tl.dot(do_t, tl.trans(v_t), input_precision=PRECISION)
            else:
                d_score = tl.dot(do_t, tl.trans(v_t), d_score, input_precision=PRECISION)
            if NKB == 1:  # else later, when the tiles of delta have left the registers
                if vb == 0:
                    acc = tl.dot(do_t.to(OPERAND), tl.trans(s_t), input_precision=PRECISION)
                else:
                    acc = tl.dot(do_t.to(OPERAND), tl.trans(s_t), acc, input_precision=PRECISION)
        qp, qm = tile(q, ri, ok, head, HQ, K, kb * BK, BK)
        q_t = tl.load(qp, mask=qm, other=0.0)  # [BM, BK]
        delta = tl.zeros([BM], tl.float32)
        if NORMALIZE:
            # do.o from the same rounded factors as dA, so that sum_j a_ij dA_ij stays d log_mass; o would not give that
            if NKB == 1:
                score = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION)
                far = tl.sum(acc * q_t.to(tl.float32), 1)
            else:
                far = tl.zeros([BM], tl.float32)
                score = tl.zeros([BM, C], tl.float32)
                for b in tl.static_range(NKB):
                    bp, bm = tile(q, ri, ok, head, HQ, K, b * BK, BK)
                    q_b = tl.load(bp, mask=bm, other=0.0)
                    bp, bm = tile(k, rj, j_ok, hk, HK, K, b * BK, BK)
                    score = tl.dot(q_b, tl.trans(tl.load(bp, mask=bm, other=0.0)), score, input_precision=PRECISION)
                    through = tl.zeros([BM, BK], tl.float32)
                    for vb in tl.static_range(NVB):
                        bp, bm = tile(d_o, ri, ok, head, HQ, V, vb * BV, BV)
                        do_b = tl.load(bp, mask=bm, other=0.0).to(OPERAND)
                        sp, sm = state_tile(states, state, K, V, b * BK, vb * BV, BK, BV)
                        s_b = tl.load(sp, mask=sm, other=0.0)
                        through = tl.dot(do_b, tl.trans(s_b), through, input_precision=PRECISION)
                    far += tl.sum(through * q_b.to(tl.float32), 1)
            if GATED:
                far *= from_start
            delta = tl.sum(score * weight * d_score, 1) + far
        if NKB > 1:
            acc = tl.zeros([BM, BK], tl.float32)
            for vb in tl.static_range(NVB):
                dop, om = tile(d_o, ri, ok, head, HQ, V, vb * BV, BV)
                sp, sm = state_tile(states, state, K, V, kb * BK, vb * BV, BK, BV)
                do_t = tl.load(dop, mask=om, other=0.0).to(OPERAND)
                acc = tl.dot(do_t, tl.trans(tl.load(sp, mask=sm, other=0.0)), acc, input_precision=PRECISION)
        m_p = ri * HQ + head
        w = row_weights(mass, m_p, ok, scale, NORMALIZE)
        level = row_levels(d_log_mass, mass, m_p, ok, scale)
        mean = row_mean(mass, m_p, ok, delta, scale, NORMALIZE)
        e = level - mean * w
        tl.store(extra + m_p, e, mask=only_if(kb == 0, ok))
        tl.store(means + m_p, mean, mask=only_if(kb == 0, ok))
        if GATED:
            acc = acc * (w * from_start)[:, None] + (e * from_start)[:, None] * z_t[None, :]
            tl.store(row_dot + kb * row_total + m_p, tl.sum(acc * q_t.to(tl.float32), 1), mask=ok)
        else:
            acc = acc * w[:, None] + e[:, None] * z_t[None, :]
        da = ((d_score - mean[:, None]) * w[:, None] + level[:, None]) * weight
        acc = tl.dot(da.to(OPERAND), k_t.to(OPERAND), acc, input_precision=PRECISION)
        dqp, qm = tile(dq, ri, ok, head, HQ, K, kb * BK, BK)
        tl.store(dqp, acc.to(dq.dtype.element_ty), mask=qm)


@triton.jit
def gate_gradient(inside, colsum, through, whole, part):
    """dg of a chunk [C] from the places a pair (j < t <= i) can lie in; parts past the first add ``through`` only."""
    inside = tl.where(part == 0, inside - tl.cumsum(colsum, 0, reverse=True) + whole, 0.0)
    return inside + (tl.cumsum(through, 0) - through)


@triton.jit
def far_keys(
    k, v, k_part, v_part, g_hi, g_lo, d_states, dz_states, cross, rj, j_ok, last, hk, hs, hg, chunk, part,
    HK: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, GATED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and k_j.dk_j of the queries after the chunk, through the state; dg of the pairs around the chunk."""
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    WHOLE: tl.constexpr = NKB == 1 and NVB == 1  # k_part and v_part are all of k and v
    state = (chunk * HS + hs).to(tl.int64)
    ks = part * BK + tl.arange(0, BK)
    dz_t = tl.load(dz_states + state * K + ks, mask=ks < K, other=0.0)
    for vb in tl.static_range(NVB):
        if WHOLE:
            v_t = v_part
        else:
            vp, vm = tile(v, rj, j_ok, hk, HK, V, vb * BV, BV)
            v_t = tl.load(vp, mask=vm, other=0.0)
        rp, rm = state_tile(d_states, state, K, V, part * BK, vb * BV, BK, BV)
        r_t = tl.load(rp, mask=rm, other=0.0)
        if vb == 0:
            far_k = tl.dot(v_t.to(OPERAND), tl.trans(r_t), input_precision=PRECISION)
        else:
            far_k = tl.dot(v_t.to(OPERAND), tl.trans(r_t), far_k, input_precision=PRECISION)
    for kb in tl.static_range(NKB):
        if WHOLE:
            k_t = k_part
        else:
            kp, km = tile(k, rj, j_ok, hk, HK, K, kb * BK, BK)
            k_t = tl.load(kp, mask=km, other=0.0)
        if not WHOLE:
            rp, rm = state_tile(d_states, state, K, V, kb * BK, part * BV, BK, BV)
            r_t = tl.load(rp, mask=rm, other=0.0)
        if kb == 0:
            far_v = tl.dot(k_t.to(OPERAND), r_t, input_precision=PRECISION)
        else:
            far_v = tl.dot(k_t.to(OPERAND), r_t, far_v, input_precision=PRECISION)
    far_k += dz_t[None, :]
    through = tl.zeros([rj.shape[0]], tl.float32)
    whole = 0.0
    if GATED:
        gj, gj_lo = decay_row(g_hi, g_lo, rj, j_ok, hg, HG)
        end, end_lo = decay_row(g_hi, g_lo, last, last >= 0, hg, HG)
        to_end = tl.exp2((end - gj) + (end_lo - gj_lo))
        far_k *= to_end[:, None]
        far_v *= to_end[:, None]
        through = tl.sum(far_k * k_part.to(tl.float32), 1)
        for kb in tl.static_range(NKB):
            all_k = kb * BK + tl.arange(0, BK)
            whole += tl.sum(tl.load(cross + state * K + all_k, mask=all_k < K, other=0.0), 0)
    return far_k, far_v, through, whole


@triton.jit
def key_kernel(
    q, k, v, g_hi, g_lo, d_states, dz_states, d_o, mass, d_log_mass, means, row_dot, cross, dk, dv, dg, table,
    owner, scale, q_rows, k_rows, q_shift, k_shift, pairs, row_total, gate_total,
    HQ: tl.constexpr, HK: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATED: tl.constexpr,
    NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one chunk and one key head (one block of columns each), and dg of its state heads.

    d_states [chunks, HS, K, V] is the gradient of the state at the END of each chunk; cross [chunks, HS, K] its product
    with the state before the chunk, summed over V. Tiles are [keys, queries], BQ queries of one head at a time: each
    product is formed the way it is used.
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    NB: tl.constexpr = NKB if NKB > NVB else NVB
    GROUP: tl.constexpr = HQ // HK
    PER_HEAD: tl.constexpr = HS != HK
    TILES: tl.constexpr = C // BQ
    pid = tl.program_id(0)
    part = pid % NB
    hk = (pid // NB) % HK
    chunk = pid // (NB * HK)
    n, q0, k0, rows = locate_pairs(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    q += q0 * (HQ * K)
    d_o += q0 * (HQ * V)
    mass += q0 * HQ
    d_log_mass += q0 * HQ
    means += q0 * HQ
    k += k0 * (HK * K)
    dk += k0 * (HK * K)
    v += k0 * (HK * V)
    dv += k0 * (HK * V)
    if GATED:
        g_hi += k0 * HG
        g_lo += k0 * HG
        dg += k0 * HS
        row_dot += q0 * HQ

    rj = tl.arange(0, C)
    j_ok = rj < rows
    last = tl.minimum(rows, C) - 1
    kcol = part * BK
    vcol = part * BV

    kp, km = tile(k, rj, j_ok, hk, HK, K, kcol, BK)
    k_part = tl.load(kp, mask=km, other=0.0)
    vp, vm = tile(v, rj, j_ok, hk, HK, V, vcol, BV)
    v_part = tl.load(vp, mask=vm, other=0.0)
    inside = tl.zeros([C], tl.float32)
    colsum = tl.zeros([C], tl.float32)
    if PER_HEAD:
        acc_k = tl.zeros([C, BK], tl.float32)
        acc_v = tl.zeros([C, BV], tl.float32)
    else:
        hg = hk * HG // HS
        acc_k, acc_v, through, whole = far_keys(
            k, v, k_part, v_part, g_hi, g_lo, d_states, dz_states, cross, rj, j_ok, last, hk, hk, hg, chunk, part,
            HK, HS, HG, K, V, BK, BV, GATED, OPERAND, PRECISION,
        )  # fmt: skip

    for it in range(0, GROUP * TILES):
        it = tl.cast(it, tl.int32)
        member = it // TILES
        head = hk * GROUP + member
        if PER_HEAD:
            hs = head
        else:
            hs = hk
        ri = (it % TILES) * BQ + tl.arange(0, BQ)
        ok = ri < rows
        causal = (ri[None, :] >= rj[:, None]) & ok[None, :]  # [C, BQ]
        for kb in tl.static_range(NKB):
            if NB == 1:
                k_t = k_part
            else:
                bp, bm = tile(k, rj, j_ok, hk, HK, K, kb * BK, BK)
                k_t = tl.load(bp, mask=bm, other=0.0)
            qp, qm = tile(q, ri, ok, head, HQ, K, kb * BK, BK)
            q_t = tl.load(qp, mask=qm, other=0.0)  # [BQ, BK]
            if kb == 0:
                score = tl.dot(k_t, tl.trans(q_t), input_precision=PRECISION)  # [C, BQ]
            else:
                score = tl.dot(k_t, tl.trans(q_t), score, input_precision=PRECISION)
        for vb in tl.static_range(NVB):
            if NB == 1:
                v_t = v_part
            else:
                bp, bm = tile(v, rj, j_ok, hk, HK, V, vb * BV, BV)
                v_t = tl.load(bp, mask=bm, other=0.0)
            dop, om = tile(d_o, ri, ok, head, HQ, V, vb * BV, BV)
            do_t = tl.load(dop, mask=om, other=0.0)  # [BQ, BV]
            if vb == 0:
                ds = tl.dot(v_t, tl.trans(do_t), input_precision=PRECISION)
            else:
                ds = tl.dot(v_t, tl.trans(do_t), ds, input_precision=PRECISION)
        if NKB > 1:
            qp, qm = tile(q, ri, ok, head, HQ, K, kcol, BK)
            q_t = tl.load(qp, mask=qm, other=0.0)
        if NVB > 1:
            dop, om = tile(d_o, ri, ok, head, HQ, V, vcol, BV)
            do_t = tl.load(dop, mask=om, other=0.0)
        m_p = ri * HQ + head
        w = row_weights(mass, m_p, ok, scale, NORMALIZE)
        level = row_levels(d_log_mass, mass, m_p, ok, scale)
        mean = tl.load(means + m_p, mask=ok, other=0.0)
        if GATED:
            hg = hs * HG // HS
            gi, gi_lo = decay_row(g_hi, g_lo, ri, ok, hg, HG)
            gj, gj_lo = decay_row(g_hi, g_lo, rj, j_ok, hg, HG)
            d = (gi[None, :] - gj[:, None]) + (gi_lo[None, :] - gj_lo[:, None])
            weight = tl.where(causal, tl.exp2(d), 0.0)
        else:
            weight = causal.to(tl.float32)
        p = score * weight
        acc_v = tl.dot((p * w[None, :]).to(OPERAND), do_t.to(OPERAND), acc_v, input_precision=PRECISION)
        ds = (ds - mean[None, :]) * w[None, :] + level[None, :]
        if GATED:
            a_da = tl.where(ri[None, :] != rj[:, None], p * ds, 0.0)
            by_row = tl.sum(a_da, 0)  # [BQ]
            for kb in tl.static_range(NKB):
                by_row += tl.load(row_dot + kb * row_total + m_p, mask=ok, other=0.0)
            inside += tl.sum(tl.where(ri[None, :] >= rj[:, None], by_row[None, :], 0.0), 1)
            colsum += tl.sum(a_da, 1)
        acc_k = tl.dot((ds * weight).to(OPERAND), q_t.to(OPERAND), acc_k, input_precision=PRECISION)
        if PER_HEAD:
            if it % TILES == TILES - 1:
                far_k, far_v, through, whole = far_keys(
                    k, v, k_part, v_part, g_hi, g_lo, d_states, dz_states, cross, rj, j_ok, last, hk, hs,
                    hs * HG // HS, chunk, part, HK, HS, HG, K, V, BK, BV, GATED, OPERAND, PRECISION,
                )  # fmt: skip
                acc_k += far_k
                acc_v += far_v
                if GATED:
                    grad = gate_gradient(inside, colsum, through, whole, part)
                    tl.store(dg + part * gate_total + rj * HS + hs, grad, mask=j_ok)
                    inside = tl.zeros([C], tl.float32)
                    colsum = tl.zeros([C], tl.float32)

    if GATED and not PER_HEAD:
        grad = gate_gradient(inside, colsum, through, whole, part)
        tl.store(dg + part * gate_total + rj * HS + hk, grad, mask=j_ok)
    dkp, km = tile(dk, rj, j_ok, hk, HK, K, kcol, BK)
    tl.store(dkp, acc_k.to(dk.dtype.element_ty), mask=km)
    dvp, vm = tile(dv, rj, j_ok, hk, HK, V, vcol, BV)
    tl.store(dvp, acc_v.to(dv.dtype.element_ty), mask=vm)
