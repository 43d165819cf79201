"""Kernels that carry the linear state across chunks: local gate sums, chunk states, and the scan over segments.

A sequence is a run of rows, cut into chunks of C rows and segments of several chunks. Chunk states come in three
launches: every segment's own sum (``walk_kernel`` without WRITE), an exclusive scan of those over segments
(``segment_scan_kernel``), and a second walk that starts from the scanned state and writes the state before each chunk.
Reverse walks do the same for the gradients of the states. No program waits for another, and nothing is added by
atomics: results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# exp(-1000) is zero in float32: a lower log-decay, -inf included, changes no output and no gradient.
FLOOR = tl.constexpr(-1000.0)


@triton.jit
def locate(
    i, table, owner, q_rows, k_rows, q_shift, k_shift, pairs,
    SPAN: tl.constexpr, FIRST: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Sequence, index inside it, first query row, first key row and row count of the i-th chunk (or segment).

    Dense: N equal sequences of ``pairs`` rows. VARLEN: table [N, 5] holds (query row, key row, rows, first chunk, first
    segment) of each sequence and owner [...] the sequence of each chunk (segment), -1 past the last.
    """
    if VARLEN:
        n = tl.load(owner + i)
        live = n >= 0
        n = tl.maximum(n, 0).to(tl.int64)
        q0 = tl.load(table + n * 5)
        k0 = tl.load(table + n * 5 + 1)
        rows = tl.where(live, tl.load(table + n * 5 + 2), 0).to(tl.int32)
        local = i - tl.load(table + n * 5 + FIRST).to(tl.int32)
        local = tl.where(live, local, 0)
    else:
        per = tl.maximum(tl.cdiv(pairs, SPAN), 1)
        n = (i // per).to(tl.int64)
        local = i % per
        q0 = n * q_rows + q_shift
        k0 = n * k_rows + k_shift
        rows = pairs
    return n, local, q0, k0, rows


@triton.jit
def tile(ptr, rows, valid, heads, H: tl.constexpr, D: tl.constexpr, col, BD: tl.constexpr):
    """Pointers and mask [R, BD] of columns col.. of x [rows, H, D] at rows (int64 [R]) and heads ([R] or one)."""
    cols = col + tl.arange(0, BD)
    p = ptr + ((rows * H + heads) * D)[:, None] + cols[None, :]
    if D % BD == 0:
        m = valid[:, None]
    else:
        m = valid[:, None] & (cols < D)[None, :]
    return p, m


@triton.jit
def only_if(flag, mask):
    """mask where the scalar flag holds, nothing otherwise."""
    return tl.where(flag, mask, False)


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
    _, c, _, k0, rows = locate(pid // blocks, table, owner, 0, k_rows, 0, k_shift, pairs, C, 3, VARLEN)
    r = c * C + tl.arange(0, C)
    h = (pid % blocks) * BH + tl.arange(0, BH)
    p = (k0 + r)[:, None] * HG + h[None, :]
    m = (r < rows)[:, None] & (h < HG)[None, :]
    x = tl.maximum(tl.load(g + p, mask=m, other=0.0), FLOOR).to(tl.float64) * LOG2E
    x = tl.cumsum(x, 0)
    hi = x.to(tl.float32)
    tl.store(g_hi + p, hi, mask=m)
    tl.store(g_lo + p, (x - hi.to(tl.float64)).to(tl.float32), mask=m)


@triton.jit
def walk_kernel(
    a, b, mass, extra, g, g_lo, seg_states, seg_decay, s_in, z_in, states, z_states, s_out, z_out, cross, fwd_states,
    fwd_z, table, owner, scale, q_rows, k_rows, q_shift, k_shift, pairs,
    HA: tl.constexpr, HB: tl.constexpr, HQ: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, AG: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, WRITE: tl.constexpr, INIT: tl.constexpr,
    CROSS: tl.constexpr, VARLEN: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of one segment and carry S [K, V] and z [K] of one state head (one block of each).

    Forward: S <- exp(G_C) S + sum_j exp(G_C - G_j) a_j b_j^T with a = k, b = v, and z alike with 1 for b.
    REVERSE: R <- exp(G_C) R + sum_h sum_i exp(G_i) a_i w_i b_i^T with a = q, b = do, from the last chunk to the first;
    z alike with ``extra`` (the gradient of the row's denominator) for b.
    WRITE stores what stands before each chunk (in walking order) and at the sequence's end; without it only the
    segment's own sum and log-decay are stored. INIT: 0 zero, 1 from s_in/z_in, 2 from the scanned segments.
    CROSS: <state before the chunk, R after it> * exp(G_C), which every gate of the chunk receives as gradient.
    GATE: 0 none, 1 a number a head (g, g_lo: local sums), 2 a number a channel (g: log-decays).
    """
    NKB: tl.constexpr = (K + BK - 1) // BK
    NVB: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    vb = pid % NVB
    kb = (pid // NVB) % NKB
    hs = (pid // (NVB * NKB)) % HS
    seg = pid // (NVB * NKB * HS)
    n, local, q0, k0, rows = locate(seg, table, owner, q_rows, k_rows, q_shift, k_shift, pairs, C * L, 4, VARLEN)
    if REVERSE:
        a0 = q0
    else:
        a0 = k0
    chunks = tl.cdiv(rows, C)
    first = local * L
    count = tl.minimum(tl.maximum(chunks - first, 0), L)
    if VARLEN:
        chunk0 = tl.load(table + n * 5 + 3).to(tl.int32)
    else:
        chunk0 = (n * chunks).to(tl.int32)

    ks = kb * BK + tl.arange(0, BK)
    k_ok = ks < K
    o_c = tl.arange(0, C)
    hg = hs * HG // HS
    sidx = (n * HS + hs).to(tl.int64)
    gidx = (seg * HS + hs).to(tl.int64)
    E: tl.constexpr = K * (V + 1)
    vs = vb * BV + tl.arange(0, BV)
    v_ok = vs < V
    if INIT == 0:
        acc = tl.zeros([BK, BV], tl.float32)
        acc_z = tl.zeros([BK], tl.float32)
    elif INIT == 1:
        p, m = state_tile(s_in, sidx, K, V, kb * BK, vb * BV, BK, BV)
        acc = tl.load(p, mask=m, other=0.0)
        acc_z = tl.load(z_in + sidx * K + ks, mask=k_ok, other=0.0)
    else:
        acc = tl.load(
            seg_states + gidx * E + (ks * V)[:, None] + vs[None, :], mask=k_ok[:, None] & v_ok[None, :], other=0.0
        )
        acc_z = tl.load(seg_states + gidx * E + K * V + ks, mask=k_ok, other=0.0)
    if GATE == 2:
        seg_log = tl.zeros([BK], tl.float32)
        # sums[l, r]: whether gate l stands between row r and the chunk's end (its start in a reverse walk); products of
        # zeros and ones with gates split in two float16 parts are exact, so the sums are float32's
        if REVERSE:
            between = o_c[:, None] <= o_c[None, :]
        else:
            between = o_c[:, None] > o_c[None, :]
        sums = between.to(tl.float16 if OPERAND == tl.bfloat16 else tl.float32)
    else:
        seg_log = tl.zeros([1], tl.float32)

    for it in range(0, count * AG):
        it = tl.cast(it, tl.int32)
        step = it // AG
        member = it % AG
        begin = member == 0
        h = hs * HA // HS + member
        if REVERSE:
            c = first + count - 1 - step
        else:
            c = first + step
        r = c * C + o_c
        ok = r < rows
        at = tl.load(
            a + ((a0 + r) * HA + h)[None, :] * K + ks[:, None], mask=ok[None, :] & k_ok[:, None], other=0.0
        )  # [BK, C]
        bp, bm = tile(b, a0 + r, ok, hs * HB // HS + member, HB, V, vb * BV, BV)
        bt = tl.load(bp, mask=bm, other=0.0)  # [C, BV]

        if GATE == 1:
            total = tl.load(g + (k0 + tl.minimum(rows, c * C + C) - 1) * HG + hg)
            gi = tl.load(g + (k0 + r) * HG + hg, mask=ok, other=0.0)
            if REVERSE:
                row = tl.exp2(gi)
            else:
                total_lo = tl.load(g_lo + (k0 + tl.minimum(rows, c * C + C) - 1) * HG + hg)
                gi_lo = tl.load(g_lo + (k0 + r) * HG + hg, mask=ok, other=0.0)
                row = tl.exp2((total - gi) + (total_lo - gi_lo))
            x = at.to(tl.float32) * row[None, :]
            whole = tl.exp2(total)
        elif GATE == 2:
            gt = tl.load(
                g + ((k0 + r) * HG + hg)[None, :] * K + ks[:, None], mask=ok[None, :] & k_ok[:, None], other=0.0
            )
            gt = tl.maximum(gt, FLOOR) * LOG2E
            if OPERAND == tl.bfloat16:
                hi = gt.to(tl.float16)
                lo = (gt - hi.to(tl.float32)).to(tl.float16)
                d = tl.dot(hi, sums)
                d = tl.dot(lo, sums, d)
            else:
                d = tl.dot(gt, sums, input_precision="ieee")
            x = at.to(tl.float32) * tl.exp2(d)
            total = tl.sum(gt, 1)
            whole = tl.exp2(total)
        else:
            x = at.to(tl.float32)
            whole = 1.0

        if WRITE:
            chunk = ((chunk0 + c) * HS + hs).to(tl.int64)
            p, m = state_tile(states, chunk, K, V, kb * BK, vb * BV, BK, BV)
            tl.store(p, acc.to(states.dtype.element_ty), mask=only_if(begin, m))
            tl.store(z_states + chunk * K + ks, acc_z, mask=only_if(begin & (vb == 0), k_ok))
            if CROSS:
                p, m = state_tile(fwd_states, chunk, K, V, kb * BK, vb * BV, BK, BV)
                both = tl.sum(tl.load(p, mask=only_if(begin, m), other=0.0).to(tl.float32) * acc, 1)  # [BK]
                both += tl.load(fwd_z + chunk * K + ks, mask=only_if(vb == 0, k_ok), other=0.0) * acc_z
                both *= whole
                if GATE == 2:
                    tl.store(cross + (chunk * NVB + vb) * K + ks, both, mask=only_if(begin, k_ok))
                else:
                    tl.store(cross + (chunk * NVB + vb) * NKB + kb, tl.sum(both, 0), mask=begin)
        if GATE == 2:
            keep = tl.where(begin, whole, 1.0)
            acc *= keep[:, None]
            acc_z *= keep
            seg_log += tl.where(begin, total, 0.0)
        elif GATE == 1:
            keep = tl.where(begin, whole, 1.0)
            acc *= keep
            acc_z *= keep
            seg_log += tl.where(begin, total, 0.0)

        if REVERSE:
            e = tl.load(extra + (a0 + r) * HQ + h, mask=ok, other=0.0)
            acc_z += tl.sum(x * e[None, :], 1)
            w = scale
            if NORMALIZE:
                den = tl.load(mass + (a0 + r) * HQ + h, mask=ok, other=0.0)
                w = tl.where(den != 0, scale / den, 0.0)
                x *= w[None, :]
            else:
                x *= scale
        else:
            acc_z += tl.sum(x, 1)
        acc = tl.dot(x.to(OPERAND), bt.to(OPERAND), acc, input_precision=PRECISION)

    if WRITE:
        if REVERSE:
            last = first == 0
        else:
            last = first + L >= chunks
        if VARLEN:
            last = last & (tl.load(owner + seg) >= 0)
        p, m = state_tile(s_out, sidx, K, V, kb * BK, vb * BV, BK, BV)
        tl.store(p, acc, mask=only_if(last, m))
        tl.store(z_out + sidx * K + ks, acc_z, mask=only_if(last & (vb == 0), k_ok))
    else:
        tl.store(seg_states + gidx * E + (ks * V)[:, None] + vs[None, :], acc, mask=k_ok[:, None] & v_ok[None, :])
        tl.store(seg_states + gidx * E + K * V + ks, acc_z, mask=only_if(vb == 0, k_ok))
        if GATE == 2:
            tl.store(seg_decay + gidx * K + ks, seg_log, mask=only_if(vb == 0, k_ok))
        elif GATE == 1:
            one = tl.arange(0, 1)
            tl.store(seg_decay + gidx + one, seg_log, mask=only_if((vb == 0) & (kb == 0), one == 0))


@triton.jit
def segment_scan_kernel(
    seg_states, seg_decay, s_in, z_in, table, per,
    HS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, INIT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Turn each segment's own sum into what stands before it: an exclusive scan in place, elements in parallel.

    seg_states [segments, HS, K*V + K] float32 (S, then z); seg_decay [segments, HS(, K)] log2 of each segment's decay.
    """
    E: tl.constexpr = K * (V + 1)
    blocks: tl.constexpr = (E + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    e = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    hs = (pid // blocks) % HS
    n = (pid // (blocks * HS)).to(tl.int64)
    ok = e < E
    in_s = e < K * V
    channel = tl.where(in_s, e // V, e - K * V)
    if VARLEN:
        seg0 = tl.load(table + n * 5 + 4)
        count = tl.maximum(tl.cdiv(tl.load(table + n * 5 + 2), C * L), 1).to(tl.int32)
    else:
        seg0 = n * per
        count = per
    if INIT:
        carry = tl.load(s_in + (n * HS + hs) * (K * V) + e, mask=ok & in_s, other=0.0)
        carry += tl.load(z_in + (n * HS + hs) * K + channel, mask=ok & (e >= K * V), other=0.0)
    else:
        carry = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count):
        if REVERSE:
            s = (seg0 + count - 1 - i) * HS + hs
        else:
            s = (seg0 + i) * HS + hs
        own = tl.load(seg_states + s * E + e, mask=ok, other=0.0)
        if GATE == 2:
            decay = tl.exp2(tl.load(seg_decay + s * K + channel, mask=ok, other=0.0))
        elif GATE == 1:
            decay = tl.exp2(tl.load(seg_decay + s))
        else:
            decay = 1.0
        tl.store(seg_states + s * E + e, carry, mask=ok)
        carry = carry * decay + own
