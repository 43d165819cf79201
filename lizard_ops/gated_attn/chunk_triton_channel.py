"""Kernels for gates that are one number a channel, [B, T, Hk, K].

exp(G_i - G_j) stands inside the dot product over channels, so it must split into a factor for the query and one for
the key. Rows of a chunk are paired by the highest bit in which i and j differ: at level b the chunk falls into blocks
of 2^b rows, and query i of an odd block meets key j of the even block before it. With the pivot between the blocks,

    exp(G_i - G_j) = exp(sum of g from the block's start to i) * exp(sum of g after j to its block's end)

both factors are at most 1, whatever the gates, and every gate used stands between j and i: no overflow, and nothing of
a later gate reaches an earlier row. log2(C) tensor-core products and the diagonal make up the scores of a chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .chunk_triton_bwd import row_weights
from .chunk_triton_fwd import log_of
from .chunk_triton_scan import FLOOR, LOG2E, locate, only_if, state_tile, tile


@triton.jit
def summed(which, g, OPERAND: tl.constexpr):
    """exp2(which @ g) for a 0/1 matrix [R, C] and gates [C, BK]: decays over any set of rows, in float32's accuracy."""
    if OPERAND == tl.bfloat16:
        hi = g.to(tl.float16)
        lo = (g - hi.to(tl.float32)).to(tl.float16)
        which = which.to(tl.float16)
        d = tl.dot(which, hi)
        d = tl.dot(which, lo, d)
    else:
        d = tl.dot(which.to(tl.float32), g, input_precision="ieee")
    return tl.exp2(d)


@triton.jit
def level_decay(g, level, C: tl.constexpr, OPERAND: tl.constexpr):
    """The factor of each row at a level [C, BK]: from its block's start in odd blocks, to its end in even ones."""
    r = tl.arange(0, C)[:, None]
    c = tl.arange(0, C)[None, :]
    odd = ((r >> level) & 1) == 1
    same = (r >> level) == (c >> level)
    return summed(same & ((odd & (c <= r)) | ((c > r) & (odd == 0))), g, OPERAND)


@triton.jit
def meets(i, j, level):
    """Whether query i and key j are paired at this level."""
    return ((i >> level) == (j >> level) + 1) & (((i >> level) & 1) == 1)


@triton.jit
def gate_tile(g, rows, valid, head, HK: tl.constexpr, K: tl.constexpr, col, BK: tl.constexpr):
    """log2 decays [C, BK]; 0 outside."""
    p, m = tile(g, rows, valid, head, HK, K, col, BK)
    return tl.maximum(tl.load(p, mask=m, other=0.0), FLOOR) * LOG2E


@triton.jit
def head_tile(ptr, r, rows, head0, heads, H: tl.constexpr, D: tl.constexpr, col, GH: tl.constexpr, BD: tl.constexpr):
    """Pointers and mask [GH, C, BD] of GH heads from head0, ``heads`` of which exist, at the chunk's rows r."""
    h = tl.arange(0, GH)[:, None, None]
    cols = col + tl.arange(0, BD)[None, None, :]
    p = ptr + (r[None, :, None] * H + head0 + h) * D + cols
    m = (h < heads) & (r < rows)[None, :, None] & (cols < D)
    return p, m


@triton.jit
def channel_output_kernel(
    q, k, v, g, states, z_states, o, log_mass, mass, table, owner, scale, q_rows, k_rows, q_shift, k_shift, pairs,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    GH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``output_kernel`` with the decay channel by channel."""
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    GROUP: tl.constexpr = HQ // HK
    BM: tl.constexpr = GH * C
    pid = tl.program_id(0)
    vb = pid % NVB
    hk = (pid // NVB) % HK
    chunk = pid // (NVB * HK)
    n, q0, k0, rows = locate(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    g += k0 * (HK * K)
    k += k0 * (HK * K)
    v += k0 * (HK * V)
    q += q0 * (HQ * K)
    mass += q0 * HQ
    log_mass += q0 * HQ
    o += q0 * (HQ * V)
    state = (chunk * HK + hk).to(tl.int64)
    o_m = tl.arange(0, BM)
    o_c = tl.arange(0, C)
    im = o_m % C
    r_ok = o_c < rows
    vp, vm = tile(v, o_c, r_ok, hk, HK, V, vb * BV, BV)
    v_t = tl.load(vp, mask=vm, other=0.0)

    for step in range(0, (GROUP + GH - 1) // GH):
        head0 = hk * GROUP + step * GH
        score = tl.zeros([BM, C], tl.float32)
        acc = tl.zeros([BM, BV], tl.float32)
        den = tl.zeros([BM], tl.float32)
        for kb in tl.static_range(NKB):
            g_t = gate_tile(g, o_c, r_ok, hk, HK, K, kb * BK, BK)
            kp, km = tile(k, o_c, r_ok, hk, HK, K, kb * BK, BK)
            k_t = tl.load(kp, mask=km, other=0.0).to(tl.float32)
            qp, qm = head_tile(q, o_c, rows, head0, GROUP - step * GH, HQ, K, kb * BK, GH, BK)
            q_t = tl.load(qp, mask=qm, other=0.0).to(tl.float32)  # [GH, C, BK]
            diagonal = tl.reshape(tl.sum(q_t * k_t[None, :, :], 2), [BM])
            score += tl.where(im[:, None] == o_c[None, :], diagonal[:, None], 0.0)
            for level in range(0, LEVELS):
                level = tl.cast(level, tl.int32)
                e = level_decay(g_t, level, C, OPERAND)
                far_q = tl.reshape((q_t * e[None, :, :]).to(OPERAND), [BM, BK])
                far_k = (k_t * e).to(OPERAND)
                part = tl.dot(far_q, tl.trans(far_k), input_precision=PRECISION)
                score += tl.where(meets(im[:, None], o_c[None, :], level), part, 0.0)
            sp, sm = state_tile(states, state, K, V, kb * BK, vb * BV, BK, BV)
            s_t = tl.load(sp, mask=sm, other=0.0)
            ks = kb * BK + tl.arange(0, BK)
            z_t = tl.load(z_states + state * K + ks, mask=ks < K, other=0.0)
            q_t *= summed(o_c[None, :] <= o_c[:, None], g_t, OPERAND)[None, :, :]
            den += tl.reshape(tl.sum(q_t * z_t[None, None, :], 2), [BM])
            acc = tl.dot(tl.reshape(q_t.to(OPERAND), [BM, BK]), s_t, acc, input_precision=PRECISION)
        den += tl.sum(score, 1)
        acc = tl.dot(score.to(OPERAND), v_t.to(OPERAND), acc, input_precision=PRECISION)
        if NORMALIZE:
            acc *= tl.where(den != 0, 1.0 / den, 0.0)[:, None]
        else:
            acc *= scale
        head = step * GH + o_m // C
        ok = (im < rows) & (head < GROUP)
        op, om = tile(o, im, ok, hk * GROUP + head, HQ, V, vb * BV, BV)
        tl.store(op, acc.to(o.dtype.element_ty), mask=om)
        den *= scale
        m_p = im * HQ + hk * GROUP + head
        tl.store(mass + m_p, den, mask=only_if(vb == 0, ok))
        tl.store(log_mass + m_p, log_of(den), mask=only_if(vb == 0, ok))


@triton.jit
def channel_row_kernel(
    q, k, v, g, states, z_states, d_o, mass, d_log_mass, dq, extra, row_dot, table, owner, scale, q_rows, k_rows,
    q_shift, k_shift, pairs,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    GH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, the row terms e and sum_h q.dq channel by channel (row_dot [rows, HK, K], for dg).

    dq_i = w_i X_i + e_i Y_i with X the decayed sum of (do_i.v_j) k_j and Y that of k_j: no score is needed, for do.o is
    q_i.X_i / den_i. All blocks of K are visited once for q.X when K has more than one. The pair i = j, which no gate
    touches, stays out of row_dot: strong gates leave little beside it.
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    GROUP: tl.constexpr = HQ // HK
    BM: tl.constexpr = GH * C
    pid = tl.program_id(0)
    kb = pid % NKB
    hk = (pid // NKB) % HK
    chunk = pid // (NKB * HK)
    n, q0, k0, rows = locate(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    g += k0 * (HK * K)
    k += k0 * (HK * K)
    v += k0 * (HK * V)
    q += q0 * (HQ * K)
    mass += q0 * HQ
    d_log_mass += q0 * HQ
    extra += q0 * HQ
    d_o += q0 * (HQ * V)
    dq += q0 * (HQ * K)
    row_dot += k0 * (HK * K)
    o_m = tl.arange(0, BM)
    o_c = tl.arange(0, C)
    im = o_m % C
    r_ok = o_c < rows
    causal = (im[:, None] >= o_c[None, :]) & r_ok[None, :]
    g_t = gate_tile(g, o_c, r_ok, hk, HK, K, kb * BK, BK)
    kp, km = tile(k, o_c, r_ok, hk, HK, K, kb * BK, BK)
    k_t = tl.load(kp, mask=km, other=0.0).to(tl.float32)
    keys = key_sums(k_t, g_t, z_states, (chunk * HK + hk).to(tl.int64), kb, K, C, LEVELS, BK, OPERAND, PRECISION)
    dots = tl.zeros([C, BK], tl.float32)

    for step in range(0, (GROUP + GH - 1) // GH):
        head0 = hk * GROUP + step * GH
        heads = GROUP - step * GH
        member = step * GH + o_m // C
        ok = (im < rows) & (member < GROUP)
        m_p = im * HQ + hk * GROUP + member
        d_score = score_gradient(v, d_o, r_ok, im, ok, hk, member, HQ, HK, V, C, GH, BV, PRECISION)
        d_score = tl.where(causal, d_score, 0.0)
        own = tl.sum(tl.where(im[:, None] == o_c[None, :], d_score, 0.0), 1)  # do_i.v_i [BM]
        x = value_sums(
            d_score, k_t, g_t, d_o, states, ok, hk, member, chunk, kb, HQ, HK, K, V, C, LEVELS, GH, BK, BV,
            OPERAND, PRECISION,
        )  # fmt: skip
        qp, qm = head_tile(q, o_c, rows, head0, heads, HQ, K, kb * BK, GH, BK)
        q_t = tl.load(qp, mask=qm, other=0.0).to(tl.float32)
        den = tl.load(mass + m_p, mask=ok, other=0.0)
        dlm = tl.load(d_log_mass + m_p, mask=ok, other=0.0)
        inv = tl.where(den != 0, scale / den, 0.0)
        if NORMALIZE:
            if NKB == 1:
                delta = tl.reshape(tl.sum(x * q_t, 2), [BM])
                delta += own * tl.reshape(tl.sum(q_t * k_t[None, :, :], 2), [BM])
            else:
                delta = tl.zeros([BM], tl.float32)
                for b in tl.static_range(NKB):
                    g_b = gate_tile(g, o_c, r_ok, hk, HK, K, b * BK, BK)
                    bp, bm = tile(k, o_c, r_ok, hk, HK, K, b * BK, BK)
                    k_b = tl.load(bp, mask=bm, other=0.0).to(tl.float32)
                    x_b = value_sums(
                        d_score, k_b, g_b, d_o, states, ok, hk, member, chunk, b, HQ, HK, K, V, C, LEVELS, GH,
                        BK, BV, OPERAND, PRECISION,
                    )  # fmt: skip
                    bp, bm = head_tile(q, o_c, rows, head0, heads, HQ, K, b * BK, GH, BK)
                    q_b = tl.load(bp, mask=bm, other=0.0).to(tl.float32)
                    delta += tl.reshape(tl.sum(x_b * q_b, 2), [BM])
                    delta += own * tl.reshape(tl.sum(q_b * k_b[None, :, :], 2), [BM])
            w = inv
            e = (dlm - delta * inv) * inv
        else:
            w = tl.where(ok, scale, 0.0)
            e = tl.where(dlm != 0, dlm * inv, 0.0)
        tl.store(extra + m_p, e, mask=only_if(kb == 0, ok))
        x = x * tl.reshape(w, [GH, C])[:, :, None] + keys[None, :, :] * tl.reshape(e, [GH, C])[:, :, None]
        dots += tl.sum(x * q_t, 0)
        x += tl.reshape(w * own + e, [GH, C])[:, :, None] * k_t[None, :, :]
        dqp, qm = head_tile(dq, o_c, rows, head0, heads, HQ, K, kb * BK, GH, BK)
        tl.store(dqp, x.to(dq.dtype.element_ty), mask=qm)
    rp, rmask = tile(row_dot, o_c, r_ok, hk, HK, K, kb * BK, BK)
    tl.store(rp, dots, mask=rmask)


@triton.jit
def key_sums(
    k_t, g_t, z_states, state, kb, K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y [C, BK]: the decayed sum of all keys before each row, its own left out."""
    o_c = tl.arange(0, C)
    ks = kb * BK + tl.arange(0, BK)
    z_t = tl.load(z_states + state * K + ks, mask=ks < K, other=0.0)
    keys = z_t[None, :] * summed(o_c[None, :] <= o_c[:, None], g_t, OPERAND)
    for level in range(0, LEVELS):
        level = tl.cast(level, tl.int32)
        e = level_decay(g_t, level, C, OPERAND)
        which = meets(o_c[:, None], o_c[None, :], level).to(OPERAND)
        keys += tl.dot(which, (k_t * e).to(OPERAND), input_precision=PRECISION) * e
    return keys


@triton.jit
def score_gradient(
    v, d_o, r_ok, im, ok, hk, member, HQ: tl.constexpr, HK: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    GH: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """do_i.v_j [GH*C, C]."""
    GROUP: tl.constexpr = HQ // HK
    d_score = tl.zeros([GH * C, C], tl.float32)
    for vb in tl.static_range((V + BV - 1) // BV):
        vp, vm = tile(v, tl.arange(0, C), r_ok, hk, HK, V, vb * BV, BV)
        v_t = tl.load(vp, mask=vm, other=0.0)
        dop, om = tile(d_o, im, ok, hk * GROUP + member, HQ, V, vb * BV, BV)
        d_score = tl.dot(tl.load(dop, mask=om, other=0.0), tl.trans(v_t), d_score, input_precision=PRECISION)
    return d_score


@triton.jit
def value_sums(
    d_score, k_t, g_t, d_o, states, ok, hk, member, chunk, kb, HQ: tl.constexpr, HK: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, GH: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X [GH, C, BK]: the decayed sum of (do_i.v_j) k_j over the keys before i, in the chunk and in the state."""
    GROUP: tl.constexpr = HQ // HK
    BM: tl.constexpr = GH * C
    o_m = tl.arange(0, BM)
    o_c = tl.arange(0, C)
    im = o_m % C
    x = tl.zeros([BM, BK], tl.float32)
    for vb in tl.static_range((V + BV - 1) // BV):
        sp, sm = state_tile(states, (chunk * HK + hk).to(tl.int64), K, V, kb * BK, vb * BV, BK, BV)
        s_t = tl.load(sp, mask=sm, other=0.0)
        dop, om = tile(d_o, im, ok, hk * GROUP + member, HQ, V, vb * BV, BV)
        do_t = tl.load(dop, mask=om, other=0.0).to(OPERAND)
        x = tl.dot(do_t, tl.trans(s_t), x, input_precision=PRECISION)
    x = tl.reshape(x, [GH, C, BK]) * summed(o_c[None, :] <= o_c[:, None], g_t, OPERAND)[None, :, :]
    for level in range(0, LEVELS):
        level = tl.cast(level, tl.int32)
        e = level_decay(g_t, level, C, OPERAND)
        chosen = tl.where(meets(im[:, None], o_c[None, :], level), d_score, 0.0).to(OPERAND)
        part = tl.dot(chosen, (k_t * e).to(OPERAND), input_precision=PRECISION)
        x += tl.reshape(part, [GH, C, BK]) * e[None, :, :]
    return x


@triton.jit
def channel_key_kernel(
    q, k, v, g, d_states, dz_states, d_o, mass, extra, row_dot, cross, dk, dv, dg, table, owner, scale, q_rows, k_rows,
    q_shift, k_shift, pairs,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    GH: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and dg of one chunk and one key head, one block of columns each."""
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    NB: tl.constexpr = NKB if NKB > NVB else NVB
    GROUP: tl.constexpr = HQ // HK
    BM: tl.constexpr = GH * C
    pid = tl.program_id(0)
    part = pid % NB
    hk = (pid // NB) % HK
    chunk = pid // (NB * HK)
    n, q0, k0, rows = locate(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    g += k0 * (HK * K)
    k += k0 * (HK * K)
    v += k0 * (HK * V)
    q += q0 * (HQ * K)
    mass += q0 * HQ
    extra += q0 * HQ
    d_o += q0 * (HQ * V)
    dk += k0 * (HK * K)
    dv += k0 * (HK * V)
    dg += k0 * (HK * K)
    row_dot += k0 * (HK * K)
    o_m = tl.arange(0, BM)
    o_c = tl.arange(0, C)
    im = o_m % C
    r_ok = o_c < rows
    causal = (im[None, :] >= o_c[:, None]) & (im < rows)[None, :]  # [C, BM]
    kcol = part * BK
    vcol = part * BV
    ks = kcol + tl.arange(0, BK)
    g_t = gate_tile(g, o_c, r_ok, hk, HK, K, kcol, BK)
    kp, km = tile(k, o_c, r_ok, hk, HK, K, kcol, BK)
    k_t = tl.load(kp, mask=km, other=0.0).to(tl.float32)
    acc_k = tl.zeros([C, BK], tl.float32)
    own_k = tl.zeros([C, BK], tl.float32)  # of the pairs i = j
    acc_v = tl.zeros([C, BV], tl.float32)

    for step in range(0, (GROUP + GH - 1) // GH):
        head0 = hk * GROUP + step * GH
        heads = GROUP - step * GH
        member = step * GH + o_m // C
        ok = (im < rows) & (member < GROUP)
        m_p = im * HQ + hk * GROUP + member
        w = row_weights(mass, m_p, ok, scale, NORMALIZE)
        e_row = tl.load(extra + m_p, mask=ok, other=0.0)
        d_score = tl.zeros([C, BM], tl.float32)
        for vb in tl.static_range(NVB):
            vp, vm = tile(v, o_c, r_ok, hk, HK, V, vb * BV, BV)
            v_t = tl.load(vp, mask=vm, other=0.0)
            dop, om = tile(d_o, im, ok, hk * GROUP + member, HQ, V, vb * BV, BV)
            do_t = tl.load(dop, mask=om, other=0.0)
            d_score = tl.dot(v_t, tl.trans(do_t), d_score, input_precision=PRECISION)
        d_score = tl.where(causal, d_score * w[None, :] + e_row[None, :], 0.0)
        on_diagonal = o_c[:, None] == im[None, :]
        score = tl.zeros([C, BM], tl.float32)
        if NKB > 1:
            for kb in tl.static_range(NKB):
                g_b = gate_tile(g, o_c, r_ok, hk, HK, K, kb * BK, BK)
                bp, bm = tile(k, o_c, r_ok, hk, HK, K, kb * BK, BK)
                k_b = tl.load(bp, mask=bm, other=0.0).to(tl.float32)
                qp, qm = head_tile(q, o_c, rows, head0, heads, HQ, K, kb * BK, GH, BK)
                q_b = tl.load(qp, mask=qm, other=0.0).to(tl.float32)
                diagonal = tl.reshape(tl.sum(q_b * k_b[None, :, :], 2), [BM])
                score += tl.where(on_diagonal, diagonal[None, :], 0.0)
                for level in range(0, LEVELS):
                    level = tl.cast(level, tl.int32)
                    e = level_decay(g_b, level, C, OPERAND)
                    far_q = tl.reshape((q_b * e[None, :, :]).to(OPERAND), [BM, BK])
                    near = tl.dot((k_b * e).to(OPERAND), tl.trans(far_q), input_precision=PRECISION)
                    score += tl.where(meets(im[None, :], o_c[:, None], level), near, 0.0)
        qp, qm = head_tile(q, o_c, rows, head0, heads, HQ, K, kcol, GH, BK)
        q_t = tl.load(qp, mask=qm, other=0.0).to(tl.float32)
        diagonal = tl.reshape(tl.sum(tl.where(on_diagonal, d_score, 0.0), 0), [GH, C])
        own_k += tl.sum(diagonal[:, :, None] * q_t, 0)
        if NKB == 1:
            diagonal = tl.reshape(tl.sum(q_t * k_t[None, :, :], 2), [BM])
            score += tl.where(on_diagonal, diagonal[None, :], 0.0)
        for level in range(0, LEVELS):
            level = tl.cast(level, tl.int32)
            e = level_decay(g_t, level, C, OPERAND)
            far_q = tl.reshape((q_t * e[None, :, :]).to(OPERAND), [BM, BK])
            chosen = meets(im[None, :], o_c[:, None], level)
            if NKB == 1:
                near = tl.dot((k_t * e).to(OPERAND), tl.trans(far_q), input_precision=PRECISION)
                score += tl.where(chosen, near, 0.0)
            acc_k += tl.dot(tl.where(chosen, d_score, 0.0).to(OPERAND), far_q, input_precision=PRECISION) * e
        dop, om = tile(d_o, im, ok, hk * GROUP + member, HQ, V, vcol, BV)
        do_t = tl.load(dop, mask=om, other=0.0)
        acc_v = tl.dot((score * w[None, :]).to(OPERAND), do_t.to(OPERAND), acc_v, input_precision=PRECISION)

    state = (chunk * HK + hk).to(tl.int64)
    through_k = tl.zeros([C, BK], tl.float32)
    for vb in tl.static_range(NVB):
        vp, vm = tile(v, o_c, r_ok, hk, HK, V, vb * BV, BV)
        v_t = tl.load(vp, mask=vm, other=0.0).to(OPERAND)
        rp, rmask = state_tile(d_states, state, K, V, kcol, vb * BV, BK, BV)
        s_t = tl.load(rp, mask=rmask, other=0.0)
        through_k = tl.dot(v_t, tl.trans(s_t), through_k, input_precision=PRECISION)
    dz_t = tl.load(dz_states + state * K + ks, mask=ks < K, other=0.0)
    through_k = (through_k + dz_t[None, :]) * summed(o_c[None, :] > o_c[:, None], g_t, OPERAND)
    for kb in tl.static_range(NKB):
        g_b = gate_tile(g, o_c, r_ok, hk, HK, K, kb * BK, BK)
        bp, bm = tile(k, o_c, r_ok, hk, HK, K, kb * BK, BK)
        k_b = tl.load(bp, mask=bm, other=0.0).to(tl.float32)
        k_b *= summed(o_c[None, :] > o_c[:, None], g_b, OPERAND)
        rp, rmask = state_tile(d_states, state, K, V, kb * BK, vcol, BK, BV)
        s_t = tl.load(rp, mask=rmask, other=0.0)
        acc_v = tl.dot(k_b.to(OPERAND), s_t, acc_v, input_precision=PRECISION)
    dvp, vm = tile(dv, o_c, r_ok, hk, HK, V, vcol, BV)
    tl.store(dvp, acc_v.to(dv.dtype.element_ty), mask=vm)

    # dg_t: rows i >= t of q.dq less those of k.dk inside the chunk; keys before t through the state; both outside
    rp, rmask = tile(row_dot, o_c, r_ok, hk, HK, K, kcol, BK)
    later = k_t * through_k
    acc_k += through_k
    grad = tl.cumsum(tl.load(rp, mask=rmask, other=0.0) - k_t * acc_k, 0, reverse=True)
    whole = tl.sum(later, 0) + tl.load(cross + state * K + ks, mask=ks < K, other=0.0)
    dgp, km = tile(dg, o_c, r_ok, hk, HK, K, kcol, BK)
    tl.store(dgp, grad + whole[None, :], mask=km)
    dkp, km = tile(dk, o_c, r_ok, hk, HK, K, kcol, BK)
    tl.store(dkp, (acc_k + own_k).to(dk.dtype.element_ty), mask=km)
