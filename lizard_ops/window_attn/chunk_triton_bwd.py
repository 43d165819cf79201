"""Backward kernels of window attention: one over queries, one over keys, one that adds up the anchors' partial sums."""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.window_attn.chunk_triton_blocks import FAR, load_rows, locate_block, store_rows, stream_bounds

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T", "N", "STEPS"])
def window_backward_queries_kernel(
    q, k, v, anchor_k, anchor_v, sinks, first, cu_seqlens, o, lse, arg_max, d_o, d_lse, d_max,
    dq, row_term, d_sink, part_k, part_v,
    q_sn, q_st, q_sh, k_sn, k_st, k_sh, v_sn, v_st, v_sh, ak_sn, ak_st, ak_sh, av_sn, av_st, av_sh,
    T, N, STEPS, scale,
    HK: tl.constexpr, G: tl.constexpr, HB: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, A: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr, HAS_MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows as in the forward kernel: dq, each row's term sum(do o) - d lse, the sink's part, and the block's share of
    the anchors' gradients, [A, D] and [A, V] a block.

    With p = exp(s - lse): ds = p (do.v - row term), plus d row max at the largest score.
    """
    SUBS: tl.constexpr = (G + HB - 1) // HB
    i_p = tl.program_id(0)
    i_sub = i_p % SUBS
    i_h = (i_p // SUBS) % HK
    i_n, i_block, bos, length = locate_block(i_p // (SUBS * HK), cu_seqlens, T, N, STEPS, HB, 0, BM, PACKED)
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
    if CARRIED:
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
    scale_log2 = scale * LOG2E
    o_r = tl.where(m_f, o_t + P, -FAR)
    b_arg = tl.zeros([BM], tl.int32)
    b_dmax = tl.zeros([BM], tl.float32)
    if HAS_MAX:
        b_arg = tl.load(arg_max + o_out, mask=m_f, other=0)
        b_dmax = tl.load(d_max + o_out, mask=m_f, other=0.0)

    b_dq = tl.zeros([BM, BD], tl.float32)
    for a in tl.static_range(0, A, BA):
        o_a = a + tl.arange(0, BA)
        m_a = o_a < (A if CARRIED else tl.minimum(length, A))
        b_ka = load_rows(anchor_k + o_a.to(tl.int64) * ak_st, m_a, D, BD)  # [BA, BD]
        b_va = load_rows(anchor_v + o_a.to(tl.int64) * av_st, m_a, V, BV)  # [BA, BV]
        b_sa = tl.dot(b_q, tl.trans(b_ka), input_precision=PRECISION)
        keep_a = (o_r[:, None] >= (o_a + shift)[None, :]) & m_a[None, :]
        b_pa = tl.exp2(tl.where(keep_a, b_sa * scale_log2 - b_lse[:, None], float("-inf")))
        b_dpa = tl.dot(b_do, tl.trans(b_va), input_precision=PRECISION)
        b_dsa = b_pa * (b_dpa - b_term[:, None])
        if HAS_MAX:
            b_dsa += tl.where(keep_a & (b_arg[:, None] == (-1 - o_a)[None, :]), b_dmax[:, None], 0.0)
        b_dsa = b_dsa.to(b_q.dtype)
        b_dq = tl.dot(b_dsa, b_ka, b_dq, input_precision=PRECISION)
        # transposed sums, so that the score tile itself is the right operand
        b_dka = tl.dot(tl.trans(b_q), b_dsa, input_precision=PRECISION)  # [BD, BA]
        b_dva = tl.dot(tl.trans(b_do), b_pa.to(b_do.dtype), input_precision=PRECISION)  # [BV, BA]
        o_part = i_p.to(tl.int64) * A + o_a
        o_d = tl.arange(0, BD)
        o_v = tl.arange(0, BV)
        tl.store(part_k + o_part[None, :] * D + o_d[:, None], b_dka * scale, m_a[None, :] & (o_d < D)[:, None])
        tl.store(part_v + o_part[None, :] * V + o_v[:, None], b_dva, m_a[None, :] & (o_v < V)[:, None])

    start = tl.maximum(i_block * BM // HB + P - W + 1, low)
    stop = tl.minimum((i_block * BM + BM - 1) // HB + 1, length) + P
    for r in range(start, stop, BN):
        r_c = r + tl.arange(0, BN)
        m_c = r_c < stop
        b_k = load_rows(k + r_c.to(tl.int64) * k_st, m_c, D, BD)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        keep = (o_r[:, None] >= r_c[None, :]) & (o_r[:, None] < (r_c + W)[None, :])
        b_p = tl.exp2(tl.where(keep, b_s * scale_log2 - b_lse[:, None], float("-inf")))
        b_v = load_rows(v + r_c.to(tl.int64) * v_st, m_c, V, BV)  # [BN, BV]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_term[:, None])
        if HAS_MAX:
            b_ds += tl.where(keep & (b_arg[:, None] == r_c[None, :]), b_dmax[:, None], 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_rows(dq + o_out * D, b_dq * scale, m_f, D, BD)


@triton.jit(do_not_specialize=["T", "N", "STEPS"])
def window_backward_keys_kernel(
    q, k, v, first, cu_seqlens, lse, arg_max, row_term, d_o, d_max, dk, dv,
    q_sn, q_st, q_sh, k_sn, k_st, k_sh, v_sn, v_st, v_sh,
    T, N, STEPS, scale,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, A: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr, HAS_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BM stream rows of one key head, from the rows (token, query head) that see them.

    Score tiles are built keys by queries, so no accumulator is ever transposed. Unless CARRIED, the first A rows
    are anchors: another kernel stores their gradients.
    """
    i_p = tl.program_id(0)
    i_h = i_p % HK
    i_n, i_block, bos, length = locate_block(i_p // HK, cu_seqlens, T, N, STEPS, 1, P, BM, PACKED)
    if i_block * BM >= length + P:
        return
    i_row = i_n.to(tl.int64)
    if PACKED:
        q += bos * q_st
        o_token = bos
        o_stream = bos + i_row * P
        k += o_stream * k_st
        v += o_stream * v_st
    else:
        q += i_row * q_sn
        k += i_row * k_sn
        v += i_row * v_sn
        o_token = i_row * T
        o_stream = i_row * (T + P)
    k += i_h.to(tl.int64) * k_sh
    v += i_h.to(tl.int64) * v_sh
    _, low = stream_bounds(first, i_n, A, P, CARRIED)

    o_r = i_block * BM + tl.arange(0, BM)
    m_r = o_r < length + P
    b_k = load_rows(k + o_r.to(tl.int64) * k_st, m_r, D, BD)  # [BM, BD]
    b_v = load_rows(v + o_r.to(tl.int64) * v_st, m_r, V, BV)  # [BM, BV]
    newest = tl.where(m_r & (o_r >= low), o_r + W - 1, -1)
    scale_log2 = scale * LOG2E

    b_dk = tl.zeros([BM, BD], tl.float32)
    b_dv = tl.zeros([BM, BV], tl.float32)
    t_start = tl.maximum(i_block * BM - P, 0)
    t_stop = tl.minimum(i_block * BM + BM - 1 + W - P, length)
    for f in range(t_start * G, t_stop * G, BN):
        o_f = f + tl.arange(0, BN)
        o_t = o_f // G
        o_h = i_h * G + o_f % G
        m_f = o_t < t_stop
        o_out = (o_token + o_t) * (HK * G) + o_h
        b_q = load_rows(q + o_t.to(tl.int64) * q_st + o_h.to(tl.int64) * q_sh, m_f, D, BD)  # [BN, BD]
        b_do = load_rows(d_o + o_out * V, m_f, V, BV)  # [BN, BV]
        b_lse = tl.load(lse + o_out, mask=m_f, other=0.0) * LOG2E
        b_term = tl.load(row_term + o_out, mask=m_f, other=0.0)
        q_r = tl.where(m_f, o_t + P, FAR)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BM, BN]
        keep = (q_r[None, :] >= o_r[:, None]) & (q_r[None, :] <= newest[:, None])
        b_p = tl.exp2(tl.where(keep, b_s * scale_log2 - b_lse[None, :], float("-inf")))
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_term[None, :])
        if HAS_MAX:
            b_arg = tl.load(arg_max + o_out, mask=m_f, other=-FAR)
            b_dmax = tl.load(d_max + o_out, mask=m_f, other=0.0)
            b_ds += tl.where(keep & (b_arg[None, :] == o_r[:, None]), b_dmax[None, :], 0.0)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    if not CARRIED:
        m_r = m_r & (o_r >= A)
    o_out = (o_stream + o_r) * HK + i_h
    store_rows(dk + o_out * D, b_dk * scale, m_r, D, BD)
    store_rows(dv + o_out * V, b_dv, m_r, V, BV)


@triton.jit(do_not_specialize=["T", "N"])
def window_backward_anchors_kernel(
    part, cu_seqlens, dx, T, N,
    HK: tl.constexpr, SUBS: tl.constexpr, HB: tl.constexpr, DIM: tl.constexpr, A: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BX: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of one anchor of one key head, the sum of what its sequence's query blocks left.

    It goes to dx [N, A, HK, DIM] when CARRIED, else to the first rows of the sequence in dx [.., HK, DIM].
    """
    i_p = tl.program_id(0)
    i_a = i_p % A
    i_h = (i_p // A) % HK
    i_n = i_p // (A * HK)
    if PACKED:
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        block = bos * HB // BM + i_n
    else:
        length = T
        bos = i_n.to(tl.int64) * T
        block = i_n.to(tl.int64) * tl.cdiv(T * HB, BM)
    if CARRIED:
        o_out = i_n.to(tl.int64) * A + i_a
    else:
        o_out = bos + i_a
        if i_a >= length:
            return
    o_x = tl.arange(0, BX)
    b_sum = tl.zeros([BR, BX], tl.float32)
    rows = tl.cdiv(length * HB, BM) * SUBS
    for r in range(0, rows, BR):
        o_r = r + tl.arange(0, BR)
        o_p = ((block + o_r // SUBS) * HK + i_h) * SUBS + o_r % SUBS  # the program that left it
        mask = (o_r < rows)[:, None] & (o_x < DIM)[None, :]
        b_sum += tl.load(part + (o_p * A + i_a)[:, None] * DIM + o_x[None, :], mask=mask, other=0.0)
    tl.store(dx + (o_out * HK + i_h) * DIM + o_x, tl.sum(b_sum, 0).to(dx.dtype.element_ty), mask=o_x < DIM)
