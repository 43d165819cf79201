"""Backward kernels of window attention: one over queries, one over keys, one that adds up the anchors' partial sums."""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.window_attn.chunk_triton_blocks import FAR, load_rows, locate_block, store_rows, stream_bounds

LOG2E = tl.constexpr(1.4426950408889634)


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
    T, N, STEPS, scale,
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
    scale_log2 = scale * LOG2E
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
        b_sa = tl.dot(b_q, tl.trans(b_ka), input_precision=PRECISION)
        b_sa = tl.where((o_r[:, None] >= (o_a + shift)[None, :]) & m_a[None, :], b_sa, float("-inf"))
        b_dsa = score_gradient(
            b_sa, b_do, b_va, b_lse, b_term, b_arg + 1 + o_a[None, :], b_dmax, scale_log2, HAS_MAX, PRECISION
        )
        b_dq = tl.dot(b_dsa.to(b_ka.dtype), b_ka, b_dq, input_precision=PRECISION)

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
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        if (r < last_row - W + 1) | (r + BN > first_row + 1):  # not every row sees every column
            distance = o_r[:, None] - (r + o_c)[None, :]
            b_s = tl.where((distance >= 0) & (distance < W), b_s, float("-inf"))
        b_v = load_rows(v + r_long * v_st + o_v, o_c < stop - r, V, BV)  # [BN, BV]
        b_ds = score_gradient(
            b_s, b_do, b_v, b_lse, b_term, b_arg - (r + o_c)[None, :], b_dmax, scale_log2, HAS_MAX, PRECISION
        )
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_rows(dq + o_out * D, b_dq * scale, m_f, D, BD)


@triton.jit(do_not_specialize=["T", "N", "STEPS"])
def window_backward_keys_kernel(
    q, k, v, anchor_k, anchor_v, first, cu_seqlens, lse, arg_max, row_term, d_o, d_max, dk, dv, part_k, part_v,
    q_sn, q_st, q_sh, k_sn, k_st, k_sh, v_sn, v_st, v_sh, ak_sn, ak_st, ak_sh, av_sn, av_st, av_sh,
    T, N, STEPS, scale,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, A: tl.constexpr, P: tl.constexpr, HB: tl.constexpr, AB: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr,
    HAS_MAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BM - AB stream rows of one key head, from the rows (token, query head) that see them.

    The last AB rows of its tile are anchors, for which it leaves the part of the queries that stand at its own stream
    rows, [AB, D] and [AB, V]; with more than AB anchors, further programs have the other anchors alone. Score tiles
    are built keys by queries, so no accumulator is ever transposed. Unless CARRIED, the first A stream rows are the
    anchors and another kernel stores their gradients.
    """
    KB: tl.constexpr = BM - AB
    PARTS: tl.constexpr = (A + AB - 1) // AB if A > 0 else 1
    i_p = tl.program_id(0)
    i_part = i_p % PARTS
    i_h = (i_p // PARTS) % HK
    i_n, i_block, bos, length = locate_block(i_p // (PARTS * HK), cu_seqlens, T, N, STEPS, 1, P, KB, PACKED)
    if i_block * KB >= length + P:
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
    shift, low = stream_bounds(first, i_n, A, P, CARRIED)

    o_i = tl.arange(0, BM)
    o_r = i_block * KB + o_i
    m_r = (o_i + i_part * BM < KB) & (o_r < length + P)
    oldest = o_r  # first and last row that sees the key
    m_open = m_r & (o_r >= low)
    newest = tl.where(m_open, o_r + W - 1, -1)
    p_k = k + o_r.to(tl.int64) * k_st
    p_v = v + o_r.to(tl.int64) * v_st
    m_k = m_r
    o_a = i_part * AB + o_i - KB
    m_a = (o_i >= KB) & (o_a < A)
    if A > 0:
        if CARRIED:
            anchor_k += i_row * ak_sn + i_h.to(tl.int64) * ak_sh
            anchor_v += i_row * av_sn + i_h.to(tl.int64) * av_sh
        else:
            anchor_k = k
            anchor_v = v
            m_k = m_k | (m_a & (o_a < length))
        p_k = tl.where(m_a, anchor_k + o_a.to(tl.int64) * ak_st, p_k)
        p_v = tl.where(m_a, anchor_v + o_a.to(tl.int64) * av_st, p_v)
        oldest = tl.where(m_a, tl.maximum(o_a + shift, i_block * KB), oldest)
        newest = tl.where(m_a, i_block * KB + KB - 1, newest)
        o_r = tl.where(m_a, -1 - o_a, o_r)
        if CARRIED:
            m_k = m_k | m_a
    b_k = load_rows(p_k, m_k, D, BD)  # [BM, BD]
    b_v = load_rows(p_v, m_k, V, BV)  # [BM, BV]
    scale_log2 = scale * LOG2E

    # query tiles: BN // HB tokens, HB heads of the group
    TOKENS: tl.constexpr = BN // HB
    SUBS: tl.constexpr = (G + HB - 1) // HB
    o_n = tl.arange(0, BN)
    o_g = o_n % HB
    o_q = (o_n // HB).to(tl.int64) * q_st + o_g.to(tl.int64) * q_sh
    o_row = (o_n // HB) * (HK * G) + o_g
    q += i_h.to(tl.int64) * G * q_sh
    b_dk = tl.zeros([BM, BD], tl.float32)
    b_dv = tl.zeros([BM, BV], tl.float32)
    t_start = tl.maximum(i_block * KB - P, 0)
    t_stop = tl.minimum(i_block * KB + KB - 1 + W - P, length)
    for i in range(0, tl.cdiv(t_stop - t_start, TOKENS) * SUBS):
        t = t_start + (i // SUBS) * TOKENS
        g = (i % SUBS) * HB
        m_n = o_n // HB < t_stop - t
        if G % HB > 0:
            m_n = m_n & (o_g < G - g)
        t_long = tl.cast(t, tl.int64)
        p_row = (o_token + t_long) * (HK * G) + i_h * G + g
        b_q = load_rows(q + t_long * q_st + tl.cast(g, tl.int64) * q_sh + o_q, m_n, D, BD)  # [BN, BD]
        b_do = load_rows(d_o + p_row * V + o_row * V, m_n, V, BV)  # [BN, BV]
        b_lse = tl.load(lse + p_row + o_row, mask=m_n, other=0.0) * LOG2E
        b_term = tl.load(row_term + p_row + o_row, mask=m_n, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BM, BN]
        edge = (t + P < i_block * KB + KB) | (t + TOKENS + P > i_block * KB + W)
        b_s = tl.where((m_open | edge)[:, None], b_s, float("-inf"))  # else the queries see all window rows, no anchor
        if edge:
            o_query = t + P + o_n // HB
            keep = (o_query[None, :] >= oldest[:, None]) & (o_query[None, :] <= newest[:, None])
            b_s = tl.where(keep, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_term[None, :])
        if HAS_MAX:
            b_arg = tl.load(arg_max + p_row + o_row, mask=m_n, other=-FAR)
            b_dmax = tl.load(d_max + p_row + o_row, mask=m_n, other=0.0)
            b_largest = (b_arg[None, :] == o_r[:, None]) & (b_p > 0.0)
            b_ds += tl.where(b_largest, b_dmax[None, :], 0.0)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    b_dk *= scale
    if A > 0:
        o_part = (i_p // PARTS).to(tl.int64) * A + o_a
        store_rows(part_k + o_part * D, b_dk, m_a, D, BD)
        store_rows(part_v + o_part * V, b_dv, m_a, V, BV)
        if not CARRIED:
            m_r = m_r & (o_r >= A)
    o_out = (o_stream + o_r) * HK + i_h
    store_rows(dk + o_out * D, b_dk, m_r, D, BD)
    store_rows(dv + o_out * V, b_dv, m_r, V, BV)


@triton.jit(do_not_specialize=["T", "N"])
def window_backward_anchors_kernel(
    part, cu_seqlens, dx, T, N,
    HK: tl.constexpr, DIM: tl.constexpr, A: tl.constexpr, P: tl.constexpr, KB: tl.constexpr, BR: tl.constexpr,
    BX: tl.constexpr, PACKED: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of one anchor of one key head, the sum of what its sequence's key blocks left.

    It goes to dx [N, A, HK, DIM] when CARRIED, else to the first rows of the sequence in dx [.., HK, DIM].
    """
    i_p = tl.program_id(0)
    i_a = i_p % A
    i_h = (i_p // A) % HK
    i_n = i_p // (A * HK)
    if PACKED:
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        block = (bos + i_n * P) // KB + i_n
    else:
        length = T
        bos = i_n.to(tl.int64) * T
        block = i_n.to(tl.int64) * tl.cdiv(T + P, KB)
    if CARRIED:
        o_out = i_n.to(tl.int64) * A + i_a
    else:
        o_out = bos + i_a
        if i_a >= length:
            return
    o_x = tl.arange(0, BX)
    b_sum = tl.zeros([BR, BX], tl.float32)
    blocks = tl.cdiv(length + P, KB)
    for r in range(0, blocks, BR):
        o_r = r + tl.arange(0, BR)
        mask = (o_r < blocks)[:, None] & (o_x < DIM)[None, :]
        p_part = part + (((block + o_r) * HK + i_h) * A + i_a)[:, None] * DIM + o_x[None, :]
        b_sum += tl.load(p_part, mask=mask, other=0.0)
    tl.store(dx + (o_out * HK + i_h) * DIM + o_x, tl.sum(b_sum, 0).to(dx.dtype.element_ty), mask=o_x < DIM)
