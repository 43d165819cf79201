"""The places of kept keys in a decode step: who takes one, and the exact attention over them."""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.tiles.softcap import capped
from lizard_ops.tiles.strided import load_rows
from lizard_ops.window_attn.triton.fwd import absorb

EMPTY = tl.constexpr(1 << 61)  # above any position: how empty places are told from held ones as they are compared


@triton.jit
def row_of(field, i_p, size, PAGE: tl.constexpr):
    """Where row i_p of a field of the state begins: ``size`` numbers a row, or one row every PAGE bytes."""
    if PAGE == 0:
        return field + i_p * size
    else:
        return field + i_p * (PAGE // (field.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def worst_place(p_held, p_scores, begin, HK: tl.constexpr, P, BK: tl.constexpr):
    """(its score, its rank, its number) of the first to give way of P places: the lowest score, of equal ones the first
    empty place, else the last position. Ranks are positions, those of empty places above ``EMPTY``, and -1 of no place.

    begin: how many places the head has before these. HK: from place to place, 1 where each head has its own number of
    places.
    """
    o_p = tl.arange(0, BK)
    b_held = tl.load(p_held + o_p * HK, mask=o_p < P, other=-1)
    b_scores = tl.load(p_scores + o_p * HK, mask=o_p < P, other=float("inf"))
    worst = tl.min(b_scores, 0)
    b_rank = tl.where(b_held < 0, 2 * EMPTY - (begin + o_p).to(tl.int64), b_held)
    b_rank = tl.where((o_p < P) & (b_scores == worst), b_rank, -1)
    top = tl.max(b_rank, 0)
    return worst, top, tl.min(tl.where(b_rank == top, o_p, BK), 0)


@triton.jit
def choose_place(p_held, p_scores, score, leaves, HK: tl.constexpr, P, BK: tl.constexpr):
    """(the place that a key with this score takes or -1, whether a key expires, that one or the one it displaces)."""
    worst, top, place = worst_place(p_held, p_scores, 0, HK, P, BK)
    takes = leaves & ((score > worst) | (top >= EMPTY))  # an equal one that is kept is earlier
    return tl.where(takes, place, -1), leaves & (top < EMPTY)


@triton.jit
def absorb_places(
    b_q, p_held, kept_k, kept_v, p_new_k, p_new_v, place, b_m, b_l, b_o, b_arg, scale_log2, cap,
    HK: tl.constexpr, D: tl.constexpr, V: tl.constexpr, P, BN: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The running softmax (b_m, b_l, b_o) over the places, one of which holds the new key if ``place`` is not -1.

    p_new_k, p_new_v: None where there is no new key: ``place`` is left out. ALIGNED: every row begins at a multiple of
    16 bytes.
    """
    o_c = tl.arange(0, BN)
    for c in range(0, P, BN):
        o_p = c + o_c
        if p_new_k is None:
            m_p = (o_p < P) & (o_p != place) & (tl.load(p_held + o_p * HK, mask=o_p < P, other=-1) >= 0)
            p_k = kept_k + o_p * (HK * D)
            p_v = kept_v + o_p * (HK * V)
        else:
            new = o_p == place
            m_p = (o_p < P) & (new | (tl.load(p_held + o_p * HK, mask=o_p < P, other=-1) >= 0))
            p_k = tl.where(new, p_new_k + o_p * 0, kept_k + o_p * (HK * D))
            p_v = tl.where(new, p_new_v + o_p * 0, kept_v + o_p * (HK * V))
            if ALIGNED:  # of a choice between two addresses the compiler knows nothing
                p_k, p_v = tl.multiple_of(p_k, 16), tl.multiple_of(p_v, 16)
        b_k = load_rows(p_k, m_p, D, BD)  # [BN, BD]
        b_v = load_rows(p_v, m_p, V, BV)  # [BN, BV]
        b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
        b_s = tl.where(m_p[None, :], b_s, float("-inf"))
        b_m, b_l, b_o, b_arg = absorb(b_s, b_v, b_m, b_l, b_o, b_arg, 0, 1, scale_log2, False, PRECISION)
    return b_m, b_l, b_o


@triton.jit
def pass_gate(
    p_kept_g, p_held, place, gate, passed, HK: tl.constexpr, STATES: tl.constexpr, P, BK: tl.constexpr
):  # fmt: skip
    """The gates of all places go on by ``gate``, that of a new key begins; the log-decay of the key that expires."""
    o_p = tl.arange(0, BK)
    p_g = p_kept_g + o_p * (HK * STATES)
    b_g = tl.load(p_g, mask=o_p < P, other=0.0) + gate
    b_g = tl.where(tl.load(p_held + o_p * HK, mask=o_p < P, other=-1) < 0, 0.0, b_g)
    displaced = tl.sum(tl.where(o_p == place, b_g, 0.0), 0)
    tl.debug_barrier()
    tl.store(p_g, tl.where(o_p == place, passed, b_g), mask=o_p < P)
    return tl.where(place < 0, passed, displaced)
