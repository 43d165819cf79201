"""One decode step of hybrid attention in one launch: both branches, their mix, and the state in place."""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.hybrid_attn.triton.decode_parts import absorb_parts, choose_among_parts, parts_of_head
from lizard_ops.hybrid_attn.triton.decode_places import absorb_places, choose_place, pass_gate, row_of
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.softcap import capped
from lizard_ops.tiles.strided import load_rows
from lizard_ops.window_attn.triton.fwd import absorb

TICKET = tl.constexpr(1 << 40)  # above any position, so that position + k tickets holds both


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def feature_terms(p_x, m_x, FP: tl.constexpr, BP: tl.constexpr, MAP: tl.constexpr):
    """Rows of pre-activations: shift and factor of the half exp(x), of the half exp(-x), log offset, [rows] each."""
    zero = tl.zeros(m_x.shape, tl.float32)
    if MAP == "identity":
        return zero, zero, zero, zero, zero
    else:
        o_x = tl.arange(0, BP)
        mask = m_x[:, None] & (o_x < FP)[None, :]
        b_x = tl.load(p_x[:, None] + o_x[None, :], mask=mask, other=0.0).to(tl.float32)
        high = tl.where(m_x, tl.max(tl.where(mask, b_x, float("-inf")), 1), 0.0)
        low = tl.where(m_x, tl.max(tl.where(mask, -b_x, float("-inf")), 1), 0.0)
        if MAP == "softmax":
            high_factor = tl.sum(tl.where(mask, exp(b_x - high[:, None]), 0.0), 1)
            low_factor = tl.sum(tl.where(mask, exp(-b_x - low[:, None]), 0.0), 1)
            return high, 1.0 / tl.where(m_x, high_factor, 1.0), low, 1.0 / tl.where(m_x, low_factor, 1.0), zero
        else:
            top = tl.maximum(high, low)
            return top, zero + 1.0, top, zero + 1.0, top


@triton.jit
def features_at(
    p_x, m_x, o_f, high, high_factor, low, low_factor, FP: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """Expanded features [rows, len(o_f)], zero past F and in masked rows."""
    mask = m_x[:, None] & (o_f < F)[None, :]
    if MAP == "identity":
        b_x = tl.load(p_x[:, None] + o_f[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        positive = (o_f < FP)[None, :]
        o_x = tl.where(o_f < FP, o_f, o_f - FP)
        b_x = tl.load(p_x[:, None] + o_x[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x = exp(tl.where(positive, b_x - high[:, None], -b_x - low[:, None]))
        b_x = tl.where(mask, b_x * tl.where(positive, high_factor[:, None], low_factor[:, None]), 0.0)
    return b_x


@triton.jit
def hybrid_decode_kernel(
    q, k, v, fq, fk, g, sinks, weight, o,
    position, s, z, log_scale, ring_k, ring_v, ring_fk, ring_g, anchor_k, anchor_v,
    kept_k, kept_v, kept_fk, kept_g, kept_scores, kept_positions, ring_scores, scores, starts, indices,
    part_o, part_sums, part_worst, part_ends,
    q_sn, q_sh, k_sn, k_sh, v_sn, v_sh, fq_sn, fq_sh, fk_sn, fk_sh, weight_sn, scale_log2, cap,
    log_feature_scale,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, FP: tl.constexpr, F: tl.constexpr,
    W: tl.constexpr, A: tl.constexpr, M: tl.constexpr, GATES: tl.constexpr, STATES: tl.constexpr,
    CHANNEL: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr, BX: tl.constexpr,
    BF: tl.constexpr, BN: tl.constexpr, BA: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, OUTSIDE: tl.constexpr,
    MAP: tl.constexpr, MERGE: tl.constexpr, RELATIVE: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    P: tl.constexpr, SLOTS: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr, BJ: tl.constexpr,
    ALIGNED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One program: one row of the batch and one key head with the G query heads that read it.

    GATES numbers per token (0: none, CHANNEL: F per key head), STATES linear sums per key head (1 or G); weight:
    alpha, or the merge bias; P places of kept keys, SLOTS scores in their ring. starts: None, or where each head's own
    places begin in the list of a row's, and where that ends; P is then no less than any head has. PART: 0, or how many
    places a part has, whose sums are in the tensors ``part_`` (``decode_parts.py``) and BJ of them added at once.
    indices: None, or which row of the state each has, -1 for rows that are nobody's. Every load of a state tensor
    precedes the barrier before its stores. What the programs of a row share (its position, one gate for all heads) is
    written by the last of them: each adds a ticket above the bits of the position once it needs them no more.
    """
    HQ: tl.constexpr = HK * G
    STEP: tl.constexpr = HK if starts is None else 1  # from a head's place to its next
    EXPIRING: tl.constexpr = P > 0 and OUTSIDE  # sums are decayed up to the newest token
    LATE: tl.constexpr = P > 0 and kept_fk is not None  # keys join them when they lose their place, not the window
    SCALED: tl.constexpr = MAP == "exp" or EXPIRING
    i_h = tl.program_id(0) % HK
    i_n = (tl.program_id(0) // HK).to(tl.int64)
    o_g = tl.arange(0, BG)
    m_g = o_g < G
    o_h = i_h * G + o_g
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    p_o = o + (i_n * HQ + o_h)[:, None] * V + o_v[None, :]
    m_o = m_g[:, None] & m_v[None, :]
    i_p = i_n  # the row of the state
    if indices is not None:
        i_p = tl.load(indices + i_n).to(tl.int64)
        if i_p < 0:
            tl.store(p_o, tl.zeros([BG, BV], o.dtype.element_ty), mask=m_o)
            return
    position = row_of(position, i_p, 1, PAGE)
    p = tl.load(position) & (TICKET - 1)
    slot = (p % W).to(tl.int32)
    newest = tl.minimum(p, 1 << 30).to(tl.int32)

    # window branch: the anchors and the new key, then the ring without the slot that the new key takes
    k += i_n * k_sn + i_h * k_sh
    v += i_n * v_sn + i_h * v_sh
    ring_k = row_of(ring_k, i_p, W * HK * D, PAGE) + i_h * D
    ring_v = row_of(ring_v, i_p, W * HK * V, PAGE) + i_h * V
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_q = q + i_n * q_sn + o_h.to(tl.int64) * q_sh
    b_q = load_rows(p_q, m_g, D, BD)  # [BG, BD]
    b_m = tl.full([BG], float("-inf"), tl.float32)
    b_l = tl.zeros([BG], tl.float32)
    b_win = tl.zeros([BG, BV], tl.float32)
    b_arg = tl.zeros([BG], tl.int32)
    o_a = tl.arange(0, BA)
    m_a = (o_a == A) | ((o_a < A) & (o_a < newest))
    p_k = k + o_a * 0
    p_v = v + o_a * 0
    if A > 0:
        anchor_k = row_of(anchor_k, i_p, A * HK * D, PAGE) + i_h * D
        anchor_v = row_of(anchor_v, i_p, A * HK * V, PAGE) + i_h * V
        p_k = tl.where(o_a < A, anchor_k + o_a * (HK * D), p_k)
        p_v = tl.where(o_a < A, anchor_v + o_a * (HK * V), p_v)
    b_ka = load_rows(p_k, m_a, D, BD)  # [BA, BD]
    b_va = load_rows(p_v, m_a, V, BV)  # [BA, BV]
    b_sa = capped(tl.dot(b_q, tl.trans(b_ka), input_precision=PRECISION), cap)
    b_sa = tl.where(m_a[None, :], b_sa, float("-inf"))
    b_m, b_l, b_win, b_arg = absorb(b_sa, b_va, b_m, b_l, b_win, b_arg, 0, 1, scale_log2, False, PRECISION)
    o_c = tl.arange(0, BN)
    for c in range(0, W, BN):
        b_k = load_rows(ring_k + (c + o_c) * (HK * D), c + o_c < W, D, BD)  # [BN, BD]
        b_v = load_rows(ring_v + (c + o_c) * (HK * V), c + o_c < W, V, BV)  # [BN, BV]
        age = slot - c - o_c
        age = tl.where(age < 0, age + W, age)
        b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
        m_c = (c + o_c < W) & (age > 0) & (age + A <= newest)
        b_s = tl.where(m_c[None, :], b_s, float("-inf"))
        b_m, b_l, b_win, b_arg = absorb(b_s, b_v, b_m, b_l, b_win, b_arg, 0, 1, scale_log2, False, PRECISION)
    if P > 0:
        i_first = i_h
        all_places = P * HK
        if starts is not None:
            i_first = tl.load(starts + i_h)
            count = tl.load(starts + i_h + 1) - i_first
            all_places = tl.load(starts + HK)
        if LATE:
            kept_fk = row_of(kept_fk, i_p, all_places * FP, PAGE) + i_first * FP
        kept_k = row_of(kept_k, i_p, all_places * D, PAGE) + i_first * D
        kept_v = row_of(kept_v, i_p, all_places * V, PAGE) + i_first * V
        kept_scores = row_of(kept_scores, i_p, all_places, PAGE) + i_first
        kept_positions = row_of(kept_positions, i_p, all_places, PAGE) + i_first
        p_score = row_of(ring_scores, i_p, SLOTS * HK, PAGE) + (p % SLOTS) * HK + i_h
        leaving_score = tl.load(p_score)
        leaves = newest >= W + A
        b_near = b_m
        if PART > 0:
            i_part, parts, all_parts = parts_of_head(part_ends, i_h, HK, P, PART)
            part_o += (i_n * all_parts + i_part) * (G * V)
            part_sums += (i_n * all_parts + i_part) * (2 * G + 1)
            part_worst += (i_n * all_parts + i_part) * 2
            place, expires = choose_among_parts(part_sums, part_worst, leaving_score, leaves, parts, G, BK // PART)
            b_m, b_l, b_win = absorb_parts(
                b_q, part_o, part_sums, part_worst, kept_k, kept_v, ring_k + slot * (HK * D), ring_v + slot * (HK * V),
                place, parts, b_m, b_l, b_win, b_arg, scale_log2, cap, STEP, G, D, V, BK // PART, BJ, BG, BD, BV,
                PRECISION, ALIGNED,
            )  # fmt: skip
        else:
            place, expires = choose_place(
                kept_positions, kept_scores, leaving_score, leaves, STEP, P if starts is None else count, BK
            )  # fmt: skip
            b_m, b_l, b_win = absorb_places(
                b_q, kept_positions, kept_k, kept_v, ring_k + slot * (HK * D), ring_v + slot * (HK * V), place, b_m,
                b_l, b_win, b_arg, scale_log2, cap, STEP, D, V, P if starts is None else count, BN, BD, BV, PRECISION,
                ALIGNED,
            )  # fmt: skip
        b_max = b_near * scale_log2
        b_m *= scale_log2
    else:
        b_m *= scale_log2
        b_max = b_m
    if M > 0:
        o_m = tl.arange(0, BM)
        m_m = m_g[:, None] & (o_m < M)[None, :]
        b_sink = tl.load(sinks + o_h[:, None] * M + o_m[None, :], mask=m_m, other=float("-inf")).to(tl.float32) * LOG2E
        b_top = tl.maximum(b_m, tl.max(b_sink, 1))
        b_shrink = tl.exp2(b_m - b_top)
        b_l = b_l * b_shrink + tl.sum(tl.exp2(b_sink - b_top[:, None]), 1)
        b_win *= b_shrink[:, None]
        b_m = b_top
    b_win = b_win / b_l[:, None]

    # the key that joins the sums: the one that leaves the window or is displaced, or the new one
    if OUTSIDE:
        p_key = row_of(ring_fk, i_p, W * HK * FP, PAGE) + (slot * HK + i_h) * FP
        p_value = ring_v + slot * (HK * V)
        joined = newest - W
        if LATE:
            p_key = tl.where(place < 0, p_key, kept_fk + place * (STEP * FP))
            p_value = tl.where(place < 0, p_value, kept_v + place * (STEP * V))
            joined = tl.where(expires, A, A - 1)
    else:
        p_key = fk + i_n * fk_sn + i_h * fk_sh
        p_value = v
        joined = newest
    if GATES > 0:
        p_gate_now = g + i_n * GATES
        p_ring_gate = row_of(ring_g, i_p, W * GATES, PAGE) if OUTSIDE else p_gate_now
        p_gate = p_ring_gate + slot * GATES if OUTSIDE else p_gate_now  # of the key that joins
    one = tl.zeros([1], tl.int32)
    m_key = one + joined >= A
    p_query = fq + i_n * fq_sn + o_h.to(tl.int64) * fq_sh
    k_high, k_high_factor, k_low, k_low_factor, k_top = feature_terms(p_key + one, m_key, FP, BP, MAP)
    q_high, q_high_factor, q_low, q_low_factor, b_log = feature_terms(p_query, m_g, FP, BP, MAP)
    key_log = tl.sum(tl.where(m_key, k_top, float("-inf")))
    b_value = tl.load(p_value + o_v, mask=m_v & (o_v * 0 + joined >= A), other=0.0).to(tl.float32)  # [BV]
    o_w = tl.arange(0, BW)

    b_lin = tl.zeros([BG, BV], tl.float32)
    b_mass = tl.zeros([BG], tl.float32)
    o_x = tl.arange(0, BX)
    s = row_of(s, i_p, HK * STATES * F * V, PAGE)
    z = row_of(z, i_p, HK * STATES * F, PAGE)
    if SCALED:
        log_scale = row_of(log_scale, i_p, HK * STATES, PAGE)
    if EXPIRING and LATE and GATES > 0:
        kept_g = row_of(kept_g, i_p, all_places * STATES, PAGE)
    for i_s in tl.static_range(STATES):
        i_state = i_h * STATES + i_s
        m_s = m_g & (o_g == i_s) if STATES > 1 else m_g  # the query heads of this state
        i_gate = i_h * F if CHANNEL else (i_h * STATES + i_s if GATES > 1 else 0)
        gate = 0.0  # largest log decay of the step
        far = 0.0  # log decay from the newest key in the sums to the query
        if GATES > 0 and not CHANNEL:
            gate = tl.load(p_gate + i_gate)
            if OUTSIDE:
                b_held = tl.load(p_ring_gate + o_w * GATES + i_gate, mask=(o_w < W) & (o_w != slot), other=0.0)
                far = tl.load(p_gate_now + i_gate) + tl.sum(b_held)
        kept_log = 0.0
        key_scale = 1.0
        joined_log = key_log
        if EXPIRING and GATES > 0:
            gate = tl.load(p_gate_now + i_gate)
            if LATE:
                p_kept_g = kept_g + i_first * STATES + i_s
                joined_log += pass_gate(
                    p_kept_g, kept_positions, place, gate, far, STEP, STATES, P if starts is None else count, BK
                )  # fmt: skip
            else:
                joined_log += far
            far = 0.0
        if SCALED:
            if CHANNEL:
                gate = tl.max(tl.load(p_gate + i_gate + o_x, mask=o_x < F, other=float("-inf")))
            log_old = tl.load(log_scale + i_state)
            log_new = tl.maximum(log_old + gate, joined_log)
            log_safe = tl.where(log_new == float("-inf"), 0.0, log_new)
            kept_log = log_old - log_safe
            key_scale = exp(joined_log - log_safe)
            b_log = tl.where(m_s, b_log + log_new, b_log)
            tl.debug_barrier()
            tl.store(log_scale + i_state, log_new)
        b_top = tl.full([], float("-inf"), tl.float32)
        for f in tl.static_range(0, F, BF):
            o_f = f + tl.arange(0, BF)
            m_f = o_f < F
            p_s = s + (i_state * F + o_f)[:, None] * V + o_v[None, :]
            p_z = z + i_state * F + o_f
            m_fv = m_f[:, None] & m_v[None, :]
            b_s = tl.load(p_s, mask=m_fv, other=0.0)  # [BF, BV]
            b_z = tl.load(p_z, mask=m_f, other=0.0)
            b_phi = features_at(p_query, m_s, o_f, q_high, q_high_factor, q_low, q_low_factor, FP, F, MAP)  # [BG, BF]
            b_key = features_at(p_key + one, m_key, o_f, k_high, k_high_factor, k_low, k_low_factor, FP, F, MAP)
            b_key = tl.sum(b_key, 0) * key_scale
            b_kept = tl.zeros([BF], tl.float32) + gate
            if CHANNEL:
                b_kept = tl.load(p_gate + i_gate + o_f, mask=m_f, other=0.0)
                if OUTSIDE:
                    b_far = tl.load(p_gate_now + i_gate + o_f, mask=m_f, other=float("-inf"))
                    for w in range(0, W, 16):
                        o_held = w + tl.arange(0, 16)
                        m_held = ((o_held < W) & (o_held != slot))[:, None] & m_f[None, :]
                        p_far = p_ring_gate + i_gate + (o_held * GATES)[:, None] + o_f[None, :]
                        b_far += tl.sum(tl.load(p_far, mask=m_held, other=0.0), 0)
                    top = tl.maximum(b_top, tl.max(b_far))  # the least decayed channel so far is the unit
                    safe = tl.where(top == float("-inf"), 0.0, top)
                    b_phi *= exp(b_far - safe)[None, :]
                    b_lin *= exp(b_top - safe)
                    b_mass *= exp(b_top - safe)
                    b_top = top
            b_kept = exp(b_kept + kept_log)
            b_s = b_s * b_kept[:, None] + b_key[:, None] * b_value[None, :]
            b_z = b_z * b_kept + b_key
            b_mass += tl.sum(b_phi * b_z[None, :], 1)
            if ROUND:
                b_lin = tl.dot(b_phi.to(b_q.dtype), b_s.to(b_q.dtype), b_lin)
            else:
                b_lin = tl.dot(b_phi, b_s, b_lin, input_precision="ieee" if PRECISION == "ieee" else "tf32x3")
            tl.debug_barrier()
            tl.store(p_s, b_s, mask=m_fv)
            tl.store(p_z, b_z, mask=m_f)
        if CHANNEL and OUTSIDE:
            far = b_top
        b_log = tl.where(m_s, b_log + far, b_log)

    # mix
    empty = (b_mass == 0.0) | (b_log == float("-inf"))
    if NORMALIZE:
        b_total = tl.where(empty, 1.0, b_mass)
        b_lin = tl.where(empty[:, None], 0.0, b_lin / b_total[:, None])
    else:
        b_lin *= exp(b_log + log_feature_scale)[:, None]
    b_weight = tl.zeros([BG], tl.float32) + (0.0 if MERGE else 1.0)
    if HAS_WEIGHT:
        b_weight = tl.load(weight + i_n * weight_sn + o_h, mask=m_g, other=0.0).to(tl.float32)
    if MERGE:
        b_window = tl.log(b_l) + ((b_m - b_max) if RELATIVE else b_m) / LOG2E
        b_share = tl.log(b_total) + log_feature_scale + b_log - b_window + b_weight
        b_share = tl.where(empty, 0.0, 1.0 / (1.0 + exp(-b_share)))
        b_o = b_win + b_share[:, None] * (b_lin - b_win)
    else:
        b_o = b_lin + b_weight[:, None] * b_win
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_o)

    # the new token takes its slots
    b_k = tl.load(k + o_d, mask=m_d, other=0.0)
    b_v = tl.load(v + o_v, mask=m_v, other=0.0)
    if P > 0:  # and the key that leaves them its place
        b_leaving_k = tl.load(ring_k + slot * (HK * D) + o_d, mask=m_d, other=0.0)
        b_leaving_v = tl.load(ring_v + slot * (HK * V) + o_v, mask=m_v, other=0.0)
        if LATE:
            p_key = row_of(ring_fk, i_p, W * HK * FP, PAGE) + (slot * HK + i_h) * FP
            b_leaving_fk = tl.load(p_key + o_x, mask=o_x < FP, other=0.0)
    tl.debug_barrier()
    if P > 0:
        tl.store(p_score, tl.load(scores + i_n * HK + i_h))
        if place >= 0:
            tl.store(kept_scores + place * STEP, leaving_score)
            tl.store(kept_positions + place * STEP, p - W)
            tl.store(kept_k + place * (STEP * D) + o_d, b_leaving_k, mask=m_d)
            tl.store(kept_v + place * (STEP * V) + o_v, b_leaving_v, mask=m_v)
            if LATE:
                tl.store(kept_fk + place * (STEP * FP) + o_x, b_leaving_fk, mask=o_x < FP)
    tl.store(ring_k + slot * (HK * D) + o_d, b_k, mask=m_d)
    tl.store(ring_v + slot * (HK * V) + o_v, b_v, mask=m_v)
    if A > 0:
        tl.store(anchor_k + newest * (HK * D) + o_d, b_k, mask=m_d & (o_d * 0 + newest < A))
        tl.store(anchor_v + newest * (HK * V) + o_v, b_v, mask=m_v & (o_v * 0 + newest < A))
    if OUTSIDE:
        b_fk = tl.load(fk + i_n * fk_sn + i_h * fk_sh + o_x, mask=o_x < FP, other=0.0)
        tl.store(p_key + o_x, b_fk, mask=o_x < FP)
        if GATES > 1:
            PER_HEAD: tl.constexpr = F if CHANNEL else STATES
            m_gate = o_x < PER_HEAD
            b_gate = tl.load(p_gate_now + i_h * PER_HEAD + o_x, mask=m_gate, other=0.0)
            tl.store(p_gate + i_h * PER_HEAD + o_x, b_gate, mask=m_gate)
    tl.debug_barrier()
    tickets = tl.atomic_add(position, TICKET) // TICKET
    if tickets == HK - 1:
        tl.store(position, p + 1)
        if OUTSIDE and GATES == 1:
            tl.store(p_ring_gate + slot, tl.load(g + i_n))
