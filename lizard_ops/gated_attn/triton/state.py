"""Kernels that carry the linear state across chunks: local gate sums, what a chunk adds, and the scan over chunks.

A sequence is a run of rows, cut into chunks of C rows. Every chunk's own sum is formed on its own (``state_kernel``),
then ``scan_kernel`` walks over the chunks of a sequence with all elements of the state in parallel. The gradients of
the states take the same way backwards. No program waits for another and nothing is added by atomics: results repeat
bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.tiles.log2 import LOG2E

# exp(-1000) is zero in float32: a lower log-decay, -inf included, changes no output and no gradient.
FLOOR = tl.constexpr(-1000.0)


@triton.jit
def locate_pairs(
    i, table, owner, q_rows, k_rows, q_shift, k_shift, pairs,
    C: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Sequence, first query row, first key row and rows of the i-th chunk (rows: as many as are left, perhaps over C).

    Dense: N equal sequences of ``pairs`` rows. VARLEN: table [N, 4] holds (query row, key row, rows, first chunk) of
    each sequence and owner [chunks] the sequence of each chunk, -1 past the last.
    """
    if VARLEN:
        n = tl.load(owner + i)
        live = n >= 0
        n = tl.maximum(n, 0).to(tl.int64)
        q0 = tl.load(table + n * 4)
        k0 = tl.load(table + n * 4 + 1)
        rows = tl.where(live, tl.load(table + n * 4 + 2), 0).to(tl.int32)
        local = i - tl.load(table + n * 4 + 3).to(tl.int32)
        local = tl.where(live, local, 0)
    else:
        per = tl.maximum(tl.cdiv(pairs, C), 1)
        n = (i // per).to(tl.int64)
        local = i % per
        q0 = n * q_rows + q_shift
        k0 = n * k_rows + k_shift
        rows = pairs
    return n, q0 + local * C, k0 + local * C, rows - local * C


@triton.jit
def only_if(flag, mask):
    """mask where the scalar flag holds, nothing otherwise."""
    return tl.where(flag, mask, False)


@triton.jit
def tile(ptr, rows, valid, heads, H: tl.constexpr, D: tl.constexpr, col, BD: tl.constexpr):
    """Pointers and mask [R, BD] of columns col.. of x [rows, H, D] at rows [R] from ptr and heads ([R] or one)."""
    cols = col + tl.arange(0, BD)
    p = ptr + ((rows * H + heads) * D)[:, None] + cols[None, :]
    if D % BD == 0:
        m = only_if(col < D, valid)[:, None]
    else:
        m = valid[:, None] & (cols < D)[None, :]
    return p, m


@triton.jit
def state_tile(ptr, index, K: tl.constexpr, V: tl.constexpr, k0, v0, BK: tl.constexpr, BV: tl.constexpr):
    """Pointers and mask [BK, BV] into states [..., K, V], ``index`` counting whole states."""
    ks = k0 + tl.arange(0, BK)
    vs = v0 + tl.arange(0, BV)
    p = ptr + index.to(tl.int64) * (K * V) + (ks * V)[:, None] + vs[None, :]
    return p, (ks < K)[:, None] & (vs < V)[None, :]


@triton.jit
def gate_sum_kernel(
    g, g_hi, g_lo, table, owner, k_rows, k_shift, pairs,
    HG: tl.constexpr, C: tl.constexpr, BH: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Running sums of log-decays inside each chunk, times log2(e), as two float32 numbers.

    g, g_hi, g_lo [rows, HG]. G_i - G_j from such pairs keeps float32's relative accuracy even right after a decay of
    -1000, where a plain float32 sum has lost it.
    """
    blocks: tl.constexpr = (HG + BH - 1) // BH
    pid = tl.program_id(0)
    _, _, k0, rows = locate_pairs(pid // blocks, table, owner, 0, k_rows, 0, k_shift, pairs, C, VARLEN)
    r = tl.arange(0, C)
    h = (pid % blocks) * BH + tl.arange(0, BH)
    p = (k0 + r)[:, None] * HG + h[None, :]
    m = (r < rows)[:, None] & (h < HG)[None, :]
    x = tl.maximum(tl.load(g + p, mask=m, other=0.0), FLOOR).to(tl.float64) * LOG2E
    x = tl.cumsum(x, 0)
    hi = x.to(tl.float32)
    tl.store(g_hi + p, hi, mask=m)
    tl.store(g_lo + p, (x - hi.to(tl.float64)).to(tl.float32), mask=m)


@triton.jit
def column(x, OPERAND: tl.constexpr):
    """x [R] as the operand [R, 16] of a product whose columns sum to the product with x, in float32's accuracy."""
    place = tl.arange(0, 16)[None, :]
    if OPERAND == tl.bfloat16:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = rest - middle.to(tl.float32)
        x = tl.where(place == 0, high.to(tl.float32)[:, None], 0.0)
        x = tl.where(place == 1, middle.to(tl.float32)[:, None], x)
        return tl.where(place == 2, low[:, None], x).to(OPERAND)
    else:
        return tl.where(place == 0, x[:, None], 0.0)


@triton.jit
def state_kernel(
    a, b, mass, extra, g, g_lo, states, z_states, decays, table, owner, scale, q_rows, k_rows, q_shift, k_shift, pairs,
    HA: tl.constexpr, HQ: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, AG: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    TILES: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, VARLEN: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to S [K, V] and z [K] of one state head (one block of each), and log2 of its whole decay.

    Forward: sum_j exp(G_C - G_j) a_j b_j^T with a = k, b = v, and z alike with 1 for b.
    REVERSE: sum_h sum_i exp(G_i) a_i w_i b_i^T with a = q, b = do; z alike with ``extra`` (the gradient of the row's
    denominator) for w b.
    GATE: 0 none, 1 a number per head (g, g_lo: local sums), 2 a number per channel (g: TILES tiles of decay factors).
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    vb = pid % NVB
    kb = (pid // NVB) % NKB
    hs = (pid // (NVB * NKB)) % HS
    chunk = pid // (NVB * NKB * HS)
    n, q0, k0, rows = locate_pairs(chunk, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C, VARLEN)
    if REVERSE:
        a += q0 * (HQ * K)
        b += q0 * (HQ * V)
        mass += q0 * HQ
        extra += q0 * HQ
    else:
        a += k0 * (HA * K)
        b += k0 * (HA * V)
    ks = kb * BK + tl.arange(0, BK)
    k_ok = ks < K
    o_c = tl.arange(0, C)
    ok = o_c < rows
    hg = hs * HG // HS
    state = (chunk * HS + hs).to(tl.int64)

    if GATE == 1:
        last = tl.maximum(tl.minimum(rows, C) - 1, 0)
        total = tl.load(g + (k0 + last) * HG + hg, mask=rows > 0, other=0.0)
        decay = tl.load(g + (k0 + o_c) * HG + hg, mask=ok, other=0.0)
        if not REVERSE:
            total_lo = tl.load(g_lo + (k0 + last) * HG + hg, mask=rows > 0, other=0.0)
            decay_lo = tl.load(g_lo + (k0 + o_c) * HG + hg, mask=ok, other=0.0)
            decay = (total - decay) + (total_lo - decay_lo)
            tl.store(decays + state, total, mask=(kb == 0) & (vb == 0))
        decay = tl.exp2(decay)
    else:
        decay = tl.where(ok, 1.0, 0.0)
    if GATE == 2:
        LEVELS: tl.constexpr = TILES - 2
        part = state * TILES + (LEVELS if REVERSE else LEVELS + 1)
        f_p = g + part * (C * K) + (o_c * K)[None, :] + ks[:, None]
        f_t = tl.load(f_p, mask=(o_c < C)[None, :] & k_ok[:, None], other=0.0).to(tl.float32)  # [BK, C]

    acc = tl.zeros([BK, BV], tl.float32)
    acc_z = tl.zeros([BK], tl.float32)
    for member in range(0, AG):
        h = hs * HA // HS + member
        rows_a = (o_c * HA + h)[None, :] * K + ks[:, None]
        a_t = tl.load(a + rows_a, mask=ok[None, :] & k_ok[:, None], other=0.0)  # [BK, C]
        bp, bm = tile(b, o_c, ok, h, HA, V, vb * BV, BV)
        b_t = tl.load(bp, mask=bm, other=0.0)  # [C, BV]
        weight = decay
        z_weight = decay
        if REVERSE:
            m_p = o_c * HQ + h
            if NORMALIZE:
                den = tl.load(mass + m_p, mask=ok, other=0.0)
                weight *= tl.where(den != 0, scale / den, 0.0)
            else:
                weight *= scale
            z_weight *= tl.load(extra + m_p, mask=ok, other=0.0)
        if GATE == 2:
            a_w = a_t.to(tl.float32) * f_t
            acc_z += tl.sum(a_w * z_weight[None, :], 1)
            a_w = (a_w * weight[None, :]).to(OPERAND)
            acc = tl.dot(a_w, b_t.to(OPERAND), acc, input_precision=PRECISION)
        else:
            z_part = tl.dot(a_t.to(OPERAND), column(z_weight, OPERAND), input_precision=PRECISION)
            acc_z += tl.sum(z_part, 1)
            b_w = (b_t.to(tl.float32) * weight[:, None]).to(OPERAND)
            acc = tl.dot(a_t.to(OPERAND), b_w, acc, input_precision=PRECISION)
    p, m = state_tile(states, state, K, V, kb * BK, vb * BV, BK, BV)
    tl.store(p, acc.to(states.dtype.element_ty), mask=m)
    tl.store(z_states + state * K + ks, acc_z, mask=only_if(vb == 0, k_ok))


@triton.jit
def scan_kernel(
    states, z_states, decays, s_in, z_in, s_out, z_out, cross, fwd_states, fwd_z, table, pairs,
    HS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, INIT: tl.constexpr, CROSS: tl.constexpr, VARLEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk adds into what stands before it, in place: a scan over chunks, elements in parallel.

    states [chunks, HS, K, V], z_states [chunks, HS, K]; REVERSE runs from the last chunk to the first. s_in, z_in
    [N, HS, ...] start it (INIT) and s_out, z_out take its end. CROSS: sums over V of the forward state before each
    chunk times the gradient after it, times the chunk's decay, to cross [chunks, HS, K], for every gate of the chunk.
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    ks = (pid % NKB) * BK + tl.arange(0, BK)
    vs = tl.arange(0, BV)
    hs = (pid // NKB) % HS
    n = (pid // (NKB * HS)).to(tl.int64)
    k_ok = ks < K
    ok = k_ok[:, None] & (vs < V)[None, :]
    at = (ks * V)[:, None] + vs[None, :]
    if VARLEN:
        first = tl.load(table + n * 4 + 3)
        count = tl.cdiv(tl.load(table + n * 4 + 2), C).to(tl.int32)
    else:
        count = tl.cdiv(pairs, C)
        first = n * count
    end = n * HS + hs
    if INIT:
        carry = tl.load(s_in + end * (K * V) + at, mask=ok, other=0.0)
        carry_z = tl.load(z_in + end * K + ks, mask=k_ok, other=0.0)
    else:
        carry = tl.zeros([BK, BV], tl.float32)
        carry_z = tl.zeros([BK], tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        i = tl.cast(i, tl.int32)
        if REVERSE:
            state = (first + count - 1 - i) * HS + hs
        else:
            state = (first + i) * HS + hs
        own = tl.load(states + state * (K * V) + at, mask=ok, other=0.0).to(tl.float32)
        own_z = tl.load(z_states + state * K + ks, mask=k_ok, other=0.0)
        if CROSS:
            before = tl.load(fwd_states + state * (K * V) + at, mask=ok, other=0.0).to(tl.float32)
            before_z = tl.load(fwd_z + state * K + ks, mask=k_ok, other=0.0)
        tl.store(states + state * (K * V) + at, carry.to(states.dtype.element_ty), mask=ok)
        tl.store(z_states + state * K + ks, carry_z, mask=k_ok)
        if GATE == 2:
            keep = tl.exp2(tl.load(decays + state * K + ks, mask=k_ok, other=0.0))
            carry *= keep[:, None]
            carry_z *= keep
        elif GATE == 1:
            keep = tl.exp2(tl.load(decays + state))
            carry *= keep
            carry_z *= keep
        if CROSS:
            tl.store(cross + state * K + ks, tl.sum(before * carry, 1) + before_z * carry_z, mask=k_ok)
        carry += own
        carry_z += own_z
    tl.store(s_out + end * (K * V) + at, carry, mask=ok)
    tl.store(z_out + end * K + ks, carry_z, mask=k_ok)
