"""Kernels for gates that are one number per channel, [B, T, Hk, K].

exp(G_i - G_j) stands inside the dot product over channels, so it must split into a factor for the query and one for
the key. Rows of a chunk are paired by the highest bit in which i and j differ: at level b the chunk falls into blocks
of 2^b rows, and query i of an odd block meets key j of the even block before it. With the pivot between the blocks,

    exp(G_i - G_j) = exp(sum of g from the block's start to i) * exp(sum of g after j to its block's end)

both factors are at most 1, whatever the gates, and every gate used stands between j and i: no overflow, and nothing of
a later gate reaches an earlier row. log2(C) tensor-core products and the diagonal make up the scores of a chunk.

The factors are the same for all query heads of a key head. ``factor_kernel`` forms them once, a tile [C, K] per level,
and two more for what passes through the state: from the chunk's start to each row, and from each row to its end.

While no channel has decayed by more than 2^-BOUND since the chunk's start, one product does the work of all levels: the
query takes the factor f from the start, the key its inverse. 2^BOUND is far inside the range of bfloat16 and float32,
and a product of the two is the wanted decay. Those rows are the first ``near`` of a chunk, found on the device; the
levels pair the rest. A strong gate costs time in its own chunk, no accuracy, and nothing of it reaches an earlier row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.gated_attn.triton.bwd import row_weights
from lizard_ops.gated_attn.triton.fwd import log_of
from lizard_ops.gated_attn.triton.state import FLOOR, LOG2E, locate_pairs, only_if, state_tile, tile

LN2 = tl.constexpr(0.6931471805599453)
BOUND = tl.constexpr(58.0)  # log2 of the decay since the chunk's start up to which keys may take inverse factors


@triton.jit
def meets(i, j, step, near):
    """Whether query i and key j are paired by product 0, of the first ``near`` rows, or by that of level step - 1."""
    level = tl.maximum(step - 1, 0)
    apart = ((i >> level) == (j >> level) + 1) & (((i >> level) & 1) == 1)
    return tl.where(step == 0, (i > j) & (i < near), apart & (i >= near))


@triton.jit
def pairing(near, state, kb, NKB: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr):
    """(rows that product 0 pairs, products needed) in one block of channels."""
    rows = tl.load(near + state * NKB + kb)
    return rows, tl.where(rows < C, LEVELS + 1, 1)


@triton.jit
def factor_pair(
    factors, step, near, LEVELS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, col, BK: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """Factors [C, BK] of the queries and of the keys in one product."""
    p, m = factor_tile(factors, tl.where(step == 0, LEVELS, step - 1), LEVELS, C, K, col, BK)
    f = tl.load(p, mask=m, other=1.0)
    inverse = tl.where((tl.arange(0, C) < near)[:, None], 1.0 / f.to(tl.float32), 0.0)
    return f, tl.where(step == 0, inverse.to(OPERAND), f)


@triton.jit
def factor_tile(factors, tile_index, LEVELS: tl.constexpr, C: tl.constexpr, K: tl.constexpr, col, BK: tl.constexpr):
    """Pointers and mask [C, BK] of one tile of factors [.., LEVELS + 2, C, K], which point at their chunk's first."""
    cols = col + tl.arange(0, BK)
    p = factors + tile_index * (C * K) + (tl.arange(0, C) * K)[:, None] + cols[None, :]
    return p, (cols < K)[None, :] & (tl.arange(0, C) < C)[:, None]


@triton.jit
def own_pairs(q_t, k_t):
    """q_i.k_i [C] of tiles [C, BK], in every kernel the same bits: float32 whatever order a layout sums float64 in."""
    if q_t.dtype == tl.float32:
        return tl.sum(q_t.to(tl.float64) * k_t.to(tl.float64), 1).to(tl.float32)
    else:
        return tl.sum(q_t.to(tl.float32) * k_t.to(tl.float32), 1)


@triton.jit
def factor_kernel(
    g, factors, decays, near, table, owner, k_rows, k_shift, pairs,
    HK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, VARLEN: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """The decay factors of one chunk and key head, log2 of the chunk's whole decay, and the rows that need no levels.

    At level b rows of odd blocks decay from their block's start, rows of even blocks to their block's end. Sums over
    rows are products with matrices of zeros and ones: exact for gates split in two float16 parts, so the sums are
    float32's and none is a difference. Those from the chunk's start, whose factors are inverted too, are float64's
    where the factors are float32.
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    kb = pid % NKB
    hk = (pid // NKB) % HK
    chunk = pid // (NKB * HK)
    _, _, k0, rows = locate_pairs(chunk, table, owner, 0, k_rows, 0, k_shift, pairs, C, VARLEN)
    state = (chunk * HK + hk).to(tl.int64)
    factors += state * ((LEVELS + 2) * C * K)
    r = tl.arange(0, C)
    ks = kb * BK + tl.arange(0, BK)
    gp, gm = tile(g + k0 * (HK * K), r, r < rows, hk, HK, K, kb * BK, BK)
    g_t = tl.maximum(tl.load(gp, mask=gm, other=0.0), FLOOR) * LOG2E
    tl.store(decays + state * K + ks, tl.sum(g_t, 0), mask=ks < K)
    i = r[:, None]
    j = r[None, :]
    if OPERAND == tl.bfloat16:
        since_start = masked_sums((j <= i), g_t, OPERAND)
        passed = tl.exp2(since_start)
    else:  # a quotient of two of these is a decay, and a rounding of a sum of -50 would be 50 of a decay near 1
        exact = tl.cumsum(g_t.to(tl.float64), 0)
        since_start = exact.to(tl.float32)
        passed = tl.exp2(since_start) * (1.0 + (exact - since_start.to(tl.float64)).to(tl.float32) * LN2)
    near_rows = tl.sum((tl.min(since_start, 1) > -BOUND).to(tl.int32), 0)  # sums fall: these are the first rows
    tl.store(near + state * NKB + kb, near_rows)
    for t in tl.range(tl.where(near_rows < C, 0, LEVELS), LEVELS + 2):
        t = tl.cast(t, tl.int32)
        level = tl.minimum(t, LEVELS)
        odd = ((i >> level) & 1) == 1
        ahead = odd | (t == LEVELS)
        which = ((i >> level) == (j >> level)) & ((ahead & (j <= i)) | ((j > i) & (ahead == 0)))
        p, m = factor_tile(factors, t, LEVELS, C, K, kb * BK, BK)
        factor = tl.where(t == LEVELS, passed, tl.exp2(masked_sums(which, g_t, OPERAND)))
        tl.store(p, factor.to(factors.dtype.element_ty), mask=m)


@triton.jit
def masked_sums(which, g_t, OPERAND: tl.constexpr):
    """Sums [C, BK] of the rows of g_t [C, BK] that ``which`` [C, C] chooses."""
    if OPERAND == tl.bfloat16:
        which = which.to(tl.float16)
        hi = g_t.to(tl.float16)
        lo = (g_t - hi.to(tl.float32)).to(tl.float16)
        d = tl.dot(which, lo, tl.dot(which, hi))
    else:
        d = tl.dot(which.to(tl.float32), g_t, input_precision="ieee")
    return d


@triton.jit
def channel_output_kernel(
    q, k, v, factors, near, states, z_states, o, log_mass, mass, table, owner, scale, q_rows, k_rows, q_shift,
    k_shift, pairs,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``output_kernel`` with the decay channel by channel, one query head at a time."""
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    GROUP: tl.constexpr = HQ // HK
    pid = tl.program_id(0)
    vb = pid % NVB
    hk = (pid // NVB) % HK
    chunk = pid // (NVB * HK)
    n, q0, k0, rows = locate_pairs(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    q += q0 * (HQ * K)
    o += q0 * (HQ * V)
    mass += q0 * HQ
    log_mass += q0 * HQ
    k += k0 * (HK * K)
    v += k0 * (HK * V)
    state = (chunk * HK + hk).to(tl.int64)
    factors += state * ((LEVELS + 2) * C * K)
    r = tl.arange(0, C)
    ok = r < rows

    for member in range(0, GROUP):
        head = hk * GROUP + member
        score = tl.zeros([C, C], tl.float32)
        acc = tl.zeros([C, BV], tl.float32)
        den = tl.zeros([C], tl.float32)
        for kb in tl.static_range(NKB):
            kp, km = tile(k, r, ok, hk, HK, K, kb * BK, BK)
            k_t = tl.load(kp, mask=km, other=0.0)
            qp, qm = tile(q, r, ok, head, HQ, K, kb * BK, BK)
            q_t = tl.load(qp, mask=qm, other=0.0)
            own = own_pairs(q_t, k_t)
            score += tl.where(r[:, None] == r[None, :], own[:, None], 0.0)
            near_rows, steps = pairing(near, state, kb, (K + BK - 1) // BK, LEVELS, C)
            for step in tl.range(0, steps):
                step = tl.cast(step, tl.int32)
                f_q, f_k = factor_pair(factors, step, near_rows, LEVELS, C, K, kb * BK, BK, OPERAND)
                part = tl.dot(q_t.to(OPERAND) * f_q, tl.trans(k_t.to(OPERAND) * f_k), input_precision=PRECISION)
                score += tl.where(meets(r[:, None], r[None, :], step, near_rows), part, 0.0)
            fp, fm = factor_tile(factors, LEVELS, LEVELS, C, K, kb * BK, BK)
            far_q = q_t.to(OPERAND) * tl.load(fp, mask=fm, other=0.0)
            ks = kb * BK + tl.arange(0, BK)
            z_t = tl.load(z_states + state * K + ks, mask=ks < K, other=0.0)
            den += tl.sum(far_q.to(tl.float32) * z_t[None, :], 1)
            sp, sm = state_tile(states, state, K, V, kb * BK, vb * BV, BK, BV)
            acc = tl.dot(far_q, tl.load(sp, mask=sm, other=0.0), acc, input_precision=PRECISION)
        den += tl.sum(score, 1)
        vp, vm = tile(v, r, ok, hk, HK, V, vb * BV, BV)
        v_t = tl.load(vp, mask=vm, other=0.0).to(OPERAND)
        acc = tl.dot(score.to(OPERAND), v_t, acc, input_precision=PRECISION)
        if NORMALIZE:
            acc *= tl.where(den != 0, 1.0 / den, 0.0)[:, None]
        else:
            acc *= scale
        op, om = tile(o, r, ok, head, HQ, V, vb * BV, BV)
        tl.store(op, acc.to(o.dtype.element_ty), mask=om)
        den *= scale
        tl.store(mass + r * HQ + head, den, mask=only_if(vb == 0, ok))
        tl.store(log_mass + r * HQ + head, log_of(den), mask=only_if(vb == 0, ok))


@triton.jit
def key_sum_kernel(
    k, factors, near, z_states, key_sums, table, owner, k_rows, k_shift, pairs,
    HK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, VARLEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y [rows, HK, K] float32: the decayed sum of the keys before each row."""
    NKB: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    kb = pid % NKB
    hk = (pid // NKB) % HK
    chunk = pid // (NKB * HK)
    _, _, k0, rows = locate_pairs(chunk, table, owner, 0, k_rows, 0, k_shift, pairs, C, VARLEN)
    k += k0 * (HK * K)
    key_sums += k0 * (HK * K)
    state = (chunk * HK + hk).to(tl.int64)
    factors += state * ((LEVELS + 2) * C * K)
    r = tl.arange(0, C)
    kp, km = tile(k, r, r < rows, hk, HK, K, kb * BK, BK)
    k_t = tl.load(kp, mask=km, other=0.0)
    ks = kb * BK + tl.arange(0, BK)
    z_t = tl.load(z_states + state * K + ks, mask=ks < K, other=0.0)
    fp, fm = factor_tile(factors, LEVELS, LEVELS, C, K, kb * BK, BK)
    y = z_t[None, :] * tl.load(fp, mask=fm, other=0.0).to(tl.float32)
    near_rows, steps = pairing(near, state, kb, (K + BK - 1) // BK, LEVELS, C)
    for step in tl.range(0, steps):
        step = tl.cast(step, tl.int32)
        f_q, f_k = factor_pair(factors, step, near_rows, LEVELS, C, K, kb * BK, BK, OPERAND)
        which = meets(r[:, None], r[None, :], step, near_rows).to(OPERAND)
        y += tl.dot(which, k_t.to(OPERAND) * f_k, input_precision=PRECISION) * f_q.to(tl.float32)
    yp, ym = tile(key_sums, r, r < rows, hk, HK, K, kb * BK, BK)
    tl.store(yp, y, mask=ym)


@triton.jit
def channel_row_kernel(
    q, k, v, factors, near, states, key_sums, d_o, mass, d_log_mass, dq, extra, own_term, row_dot, table, owner,
    scale, q_rows, k_rows, q_shift, k_shift, pairs,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, the row terms e, the gradients of the pairs i = j (own_term) and the rest of sum_h q.dq by channel (row_dot).

    dq_i = w_i X_i + e_i Y_i with X the decayed sum of (do_i.v_j) k_j and Y that of k_j: no score is needed, for do.o is
    q_i.X_i / den_i. All blocks of K are visited once for q.X when K has more than one. The pair i = j, which no gate
    touches, stays out of row_dot [rows, HK, K]: strong gates leave little beside it.
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    GROUP: tl.constexpr = HQ // HK
    pid = tl.program_id(0)
    kb = pid % NKB
    hk = (pid // NKB) % HK
    chunk = pid // (NKB * HK)
    n, q0, k0, rows = locate_pairs(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    q += q0 * (HQ * K)
    dq += q0 * (HQ * K)
    d_o += q0 * (HQ * V)
    mass += q0 * HQ
    d_log_mass += q0 * HQ
    extra += q0 * HQ
    own_term += q0 * HQ
    k += k0 * (HK * K)
    v += k0 * (HK * V)
    key_sums += k0 * (HK * K)
    row_dot += k0 * (HK * K)
    state = (chunk * HK + hk).to(tl.int64)
    factors += state * ((LEVELS + 2) * C * K)
    r = tl.arange(0, C)
    ok = r < rows

    for member in range(0, GROUP):
        head = hk * GROUP + member
        d_score = tl.zeros([C, C], tl.float32)
        for vb in tl.static_range((V + BV - 1) // BV):
            vp, vm = tile(v, r, ok, hk, HK, V, vb * BV, BV)
            dop, om = tile(d_o, r, ok, head, HQ, V, vb * BV, BV)
            do_t = tl.load(dop, mask=om, other=0.0)
            d_score = tl.dot(do_t, tl.trans(tl.load(vp, mask=vm, other=0.0)), d_score, input_precision=PRECISION)
        own = tl.sum(tl.where(r[:, None] == r[None, :], d_score, 0.0), 1)
        d_score = d_score.to(OPERAND)
        x = value_sums(d_score, k, d_o, factors, near, states, state, ok, hk, head, kb, HQ, HK, K, V, C, LEVELS, BK,
                       BV, OPERAND, PRECISION)  # fmt: skip
        qp, qm = tile(q, r, ok, head, HQ, K, kb * BK, BK)
        q_t = tl.load(qp, mask=qm, other=0.0)
        kp, km = tile(k, r, ok, hk, HK, K, kb * BK, BK)
        if NKB == 1:
            own_weight = own_pairs(q_t, tl.load(kp, mask=km, other=0.0))
            q_t = q_t.to(tl.float32)
            rest = tl.sum(x * q_t, 1)
        else:
            q_t = q_t.to(tl.float32)
            own_weight = tl.zeros([C], tl.float32)
            rest = tl.zeros([C], tl.float32)
            for b in tl.static_range(NKB):
                x_b = value_sums(d_score, k, d_o, factors, near, states, state, ok, hk, head, b, HQ, HK, K, V, C,
                                 LEVELS, BK, BV, OPERAND, PRECISION)  # fmt: skip
                bp, bm = tile(q, r, ok, head, HQ, K, b * BK, BK)
                q_b = tl.load(bp, mask=bm, other=0.0)
                bp, bm = tile(k, r, ok, hk, HK, K, b * BK, BK)
                own_weight += own_pairs(q_b, tl.load(bp, mask=bm, other=0.0))
                rest += tl.sum(x_b * q_b.to(tl.float32), 1)
        m_p = r * HQ + head
        den = tl.load(mass + m_p, mask=ok, other=0.0)
        dlm = tl.load(d_log_mass + m_p, mask=ok, other=0.0)
        inv = tl.where(den != 0, scale / den, 0.0)
        if NORMALIZE:
            w = inv
            e = (dlm - (rest + own * own_weight) * inv) * inv
            # w own + e, but exact where the pair i = j has all the mass and its two terms cancel
            others = tl.where(den != 0, (den - own_weight * scale) / den, 0.0)
            own_grad = (dlm - rest * inv + own * others) * inv
        else:
            w = tl.where(ok, scale, 0.0)
            e = tl.where(dlm != 0, dlm * inv, 0.0)
            own_grad = w * own + e
        tl.store(extra + m_p, e, mask=only_if(kb == 0, ok))
        tl.store(own_term + m_p, own_grad, mask=only_if(kb == 0, ok))
        yp, ym = tile(key_sums, r, ok, hk, HK, K, kb * BK, BK)
        x = x * w[:, None] + tl.load(yp, mask=ym, other=0.0) * e[:, None]
        rp, rm = tile(row_dot, r, ok, hk, HK, K, kb * BK, BK)
        before = tl.load(rp, mask=only_if(member > 0, rm), other=0.0)  # this program's own, of the last head
        tl.store(rp, before + x * q_t, mask=rm)
        x += own_grad[:, None] * tl.load(kp, mask=km, other=0.0).to(tl.float32)  # again: registers are short
        dqp, qm = tile(dq, r, ok, head, HQ, K, kb * BK, BK)
        tl.store(dqp, x.to(dq.dtype.element_ty), mask=qm)


@triton.jit
def value_sums(
    d_score, k, d_o, factors, near, states, state, ok, hk, head, kb, HQ: tl.constexpr, HK: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X [C, BK]: the decayed sum of (do_i.v_j) k_j over the keys before i, in the chunk and in the state."""
    r = tl.arange(0, C)
    x = tl.zeros([C, BK], tl.float32)
    for vb in tl.static_range((V + BV - 1) // BV):
        sp, sm = state_tile(states, state, K, V, kb * BK, vb * BV, BK, BV)
        s_t = tl.load(sp, mask=sm, other=0.0)
        dop, om = tile(d_o, r, ok, head, HQ, V, vb * BV, BV)
        do_t = tl.load(dop, mask=om, other=0.0).to(OPERAND)
        x = tl.dot(do_t, tl.trans(s_t), x, input_precision=PRECISION)
    fp, fm = factor_tile(factors, LEVELS, LEVELS, C, K, kb * BK, BK)
    x *= tl.load(fp, mask=fm, other=0.0).to(tl.float32)
    kp, km = tile(k, r, ok, hk, HK, K, kb * BK, BK)
    k_t = tl.load(kp, mask=km, other=0.0).to(OPERAND)
    near_rows, steps = pairing(near, state, kb, (K + BK - 1) // BK, LEVELS, C)
    for step in tl.range(0, steps):
        step = tl.cast(step, tl.int32)
        f_q, f_k = factor_pair(factors, step, near_rows, LEVELS, C, K, kb * BK, BK, OPERAND)
        chosen = tl.where(meets(r[:, None], r[None, :], step, near_rows), d_score, 0.0).to(OPERAND)
        x += tl.dot(chosen, k_t * f_k, input_precision=PRECISION) * f_q.to(tl.float32)
    return x


@triton.jit
def channel_value_kernel(
    q, k, factors, near, d_states, d_o, mass, dv, table, owner, scale, q_rows, k_rows, q_shift, k_shift, pairs,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of one chunk and one key head (one block of columns): scores as [keys, queries], times do."""
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    GROUP: tl.constexpr = HQ // HK
    pid = tl.program_id(0)
    vb = pid % NVB
    hk = (pid // NVB) % HK
    chunk = pid // (NVB * HK)
    n, q0, k0, rows = locate_pairs(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    q += q0 * (HQ * K)
    d_o += q0 * (HQ * V)
    mass += q0 * HQ
    k += k0 * (HK * K)
    dv += k0 * (HK * V)
    state = (chunk * HK + hk).to(tl.int64)
    factors += state * ((LEVELS + 2) * C * K)
    r = tl.arange(0, C)
    ok = r < rows
    acc = tl.zeros([C, BV], tl.float32)
    for kb in tl.static_range(NKB):
        kp, km = tile(k, r, ok, hk, HK, K, kb * BK, BK)
        fp, fm = factor_tile(factors, LEVELS + 1, LEVELS, C, K, kb * BK, BK)
        far_k = tl.load(kp, mask=km, other=0.0).to(OPERAND) * tl.load(fp, mask=fm, other=0.0)
        sp, sm = state_tile(d_states, state, K, V, kb * BK, vb * BV, BK, BV)
        acc = tl.dot(far_k, tl.load(sp, mask=sm, other=0.0), acc, input_precision=PRECISION)

    for member in range(0, GROUP):
        head = hk * GROUP + member
        score = tl.zeros([C, C], tl.float32)  # [keys, queries]
        for kb in tl.static_range(NKB):
            kp, km = tile(k, r, ok, hk, HK, K, kb * BK, BK)
            k_t = tl.load(kp, mask=km, other=0.0)
            qp, qm = tile(q, r, ok, head, HQ, K, kb * BK, BK)
            q_t = tl.load(qp, mask=qm, other=0.0)
            own = tl.sum(q_t.to(tl.float32) * k_t.to(tl.float32), 1)
            score += tl.where(r[:, None] == r[None, :], own[:, None], 0.0)
            near_rows, steps = pairing(near, state, kb, (K + BK - 1) // BK, LEVELS, C)
            for step in tl.range(0, steps):
                step = tl.cast(step, tl.int32)
                f_q, f_k = factor_pair(factors, step, near_rows, LEVELS, C, K, kb * BK, BK, OPERAND)
                part = tl.dot(k_t.to(OPERAND) * f_k, tl.trans(q_t.to(OPERAND) * f_q), input_precision=PRECISION)
                score += tl.where(meets(r[None, :], r[:, None], step, near_rows), part, 0.0)
        w = row_weights(mass, r * HQ + head, ok, scale, NORMALIZE)
        dop, om = tile(d_o, r, ok, head, HQ, V, vb * BV, BV)
        do_t = tl.load(dop, mask=om, other=0.0).to(OPERAND)
        acc = tl.dot((score * w[None, :]).to(OPERAND), do_t, acc, input_precision=PRECISION)
    dvp, vm = tile(dv, r, ok, hk, HK, V, vb * BV, BV)
    tl.store(dvp, acc.to(dv.dtype.element_ty), mask=vm)


@triton.jit
def channel_key_kernel(
    q, k, v, factors, near, d_states, dz_states, d_o, mass, extra, own_term, row_dot, cross, dk, dg, table, owner,
    scale, q_rows, k_rows, q_shift, k_shift, pairs,
    HQ: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NORMALIZE: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr, GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dg of one chunk and one key head (one block of columns).

    dg_t takes q.dq of the rows from t on less k.dk of the keys from t on, inside the chunk (pairs on one side of t
    cancel); k.dk through the state of the keys before t; and ``cross``, of the pairs around the chunk.
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    GROUP: tl.constexpr = HQ // HK
    pid = tl.program_id(0)
    kb = pid % NKB
    hk = (pid // NKB) % HK
    chunk = pid // (NKB * HK)
    n, q0, k0, rows = locate_pairs(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    q += q0 * (HQ * K)
    d_o += q0 * (HQ * V)
    mass += q0 * HQ
    extra += q0 * HQ
    own_term += q0 * HQ
    k += k0 * (HK * K)
    dk += k0 * (HK * K)
    dg += k0 * (HK * K)
    row_dot += k0 * (HK * K)
    v += k0 * (HK * V)
    state = (chunk * HK + hk).to(tl.int64)
    factors += state * ((LEVELS + 2) * C * K)
    r = tl.arange(0, C)
    ok = r < rows
    ks = kb * BK + tl.arange(0, BK)

    acc = tl.zeros([C, BK], tl.float32)
    for vb in tl.static_range(NVB):
        vp, vm = tile(v, r, ok, hk, HK, V, vb * BV, BV)
        sp, sm = state_tile(d_states, state, K, V, kb * BK, vb * BV, BK, BV)
        v_t = tl.load(vp, mask=vm, other=0.0).to(OPERAND)
        acc = tl.dot(v_t, tl.trans(tl.load(sp, mask=sm, other=0.0)), acc, input_precision=PRECISION)
    dz_t = tl.load(dz_states + state * K + ks, mask=ks < K, other=0.0)
    fp, fm = factor_tile(factors, LEVELS + 1, LEVELS, C, K, kb * BK, BK)
    acc = (acc + dz_t[None, :]) * tl.load(fp, mask=fm, other=0.0).to(tl.float32)
    kp, km = tile(k, r, ok, hk, HK, K, kb * BK, BK)
    whole = tl.sum(acc * tl.load(kp, mask=km, other=0.0).to(tl.float32), 0)
    whole += tl.load(cross + state * K + ks, mask=ks < K, other=0.0)

    for member in range(0, GROUP):
        head = hk * GROUP + member
        m_p = r * HQ + head
        w = row_weights(mass, m_p, ok, scale, NORMALIZE)
        e = tl.load(extra + m_p, mask=ok, other=0.0)
        d_score = tl.zeros([C, C], tl.float32)  # [keys, queries]
        for vb in tl.static_range(NVB):
            vp, vm = tile(v, r, ok, hk, HK, V, vb * BV, BV)
            dop, om = tile(d_o, r, ok, head, HQ, V, vb * BV, BV)
            value = tl.load(vp, mask=vm, other=0.0)  # not v_t, whose type may differ
            d_score = tl.dot(value, tl.trans(tl.load(dop, mask=om, other=0.0)), d_score, input_precision=PRECISION)
        d_score = d_score * w[None, :] + e[None, :]
        d_score = d_score.to(OPERAND)
        qp, qm = tile(q, r, ok, head, HQ, K, kb * BK, BK)
        q_t = tl.load(qp, mask=qm, other=0.0).to(OPERAND)
        near_rows, steps = pairing(near, state, kb, (K + BK - 1) // BK, LEVELS, C)
        for step in tl.range(0, steps):
            step = tl.cast(step, tl.int32)
            f_q, f_k = factor_pair(factors, step, near_rows, LEVELS, C, K, kb * BK, BK, OPERAND)
            chosen = tl.where(meets(r[None, :], r[:, None], step, near_rows), d_score, 0.0).to(OPERAND)
            acc += tl.dot(chosen, q_t * f_q, input_precision=GATE_PRECISION) * f_k.to(tl.float32)

    rp, rm = tile(row_dot, r, ok, hk, HK, K, kb * BK, BK)
    kp, km = tile(k, r, ok, hk, HK, K, kb * BK, BK)
    pairs_from = tl.load(rp, mask=rm, other=0.0) - tl.load(kp, mask=km, other=0.0).to(tl.float32) * acc
    from_t = (r[None, :] >= r[:, None]).to(OPERAND)
    if OPERAND == tl.bfloat16:
        high = pairs_from.to(tl.bfloat16)
        rest = pairs_from - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        grad = tl.dot(from_t, low, tl.dot(from_t, middle, tl.dot(from_t, high)))
    else:
        grad = tl.dot(from_t, pairs_from, input_precision="ieee")
    dgp, gm = tile(dg, r, ok, hk, HK, K, kb * BK, BK)
    tl.store(dgp, grad + whole[None, :], mask=gm)
    for member in range(0, GROUP):
        head = hk * GROUP + member
        own = tl.load(own_term + r * HQ + head, mask=ok, other=0.0)
        qp, qm = tile(q, r, ok, head, HQ, K, kb * BK, BK)
        acc += own[:, None] * tl.load(qp, mask=qm, other=0.0).to(tl.float32)
    dkp, km = tile(dk, r, ok, hk, HK, K, kb * BK, BK)
    tl.store(dkp, acc.to(dk.dtype.element_ty), mask=km)
