"""Decode steps of heads with many places: parts of them in programs of their own, before the step that joins them.

One program that goes through thousands of places is what a step waits for. So a part attends to its places but one, the
first that it would give up, and the step adds these few: by then it knows which of them the leaving key displaces. What
is divided follows from the numbers of places alone, so that a row has the same bits in any batch, and what parts found
is joined in their order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.places import Places, each
from lizard_ops.common.sizes import power_of_2
from lizard_ops.hybrid_attn.triton.decode_places import EMPTY, absorb_places, row_of, worst_place
from lizard_ops.tiles.launch import Launch
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.softcap import capped
from lizard_ops.tiles.strided import load_rows
from lizard_ops.tuning import tunable
from lizard_ops.window_attn.triton.fwd import absorb

UNDIVIDED = 512  # the most places that a head may have where none is divided, a power of two
JOINED = 8192  # numbers of the parts that the step adds at once


class Found(NamedTuple):
    """What the parts of all heads have found, those of head 0 first, and where each head's begin."""

    part: int  # places of a part; 0: nothing is divided
    at_once: int  # parts that the step adds at once, a power of two
    o: Tensor | None  # [N, S, G, V] float32
    sums: Tensor | None  # [N, S, 2 G + 1] float32
    worst: Tensor | None  # [N, S, 2] int64
    ends: Tensor | None  # [Hk + 1] int32, the last where all end; None where all heads have as many


NOTHING = Found(0, 0, None, None, None, None)


@tunable("decode parts")
def config_for(q: Tensor, v_dim: int) -> Launch:
    """By dims and dtype: places of a part (rows, a power of two) and of a score tile of it (columns). Not timed.

    Tiles as large as registers hold: a part has one or two, so that what counts is how often it waits for memory.
    """
    widest = max(q.shape[3], v_dim)
    if q.dtype == torch.float32 or widest > 128:
        return Launch(256, 32, 4, 1)
    return Launch(256, 256 if widest <= 64 else 128, 4, 1)


@functools.lru_cache(maxsize=1024)
def parts_of(places: Places, heads: int, part: int, device: torch.device) -> tuple[int, Tensor | None]:
    """(parts of all heads, ``Found.ends``).

    Made once, and so before a CUDA graph is captured, which follows a step that is not.
    """
    counts = [-(-n // part) for n in each(places, heads)]
    if not isinstance(places, tuple):
        return sum(counts), None
    return sum(counts), torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def in_parts(
    q: Tensor, kept: Sequence[Tensor | None], starts: Tensor | None, indices: Tensor | None, places: Places,
    scores: tuple[float, float], sizes: dict[str, Any],
) -> Found:  # fmt: skip
    """Launches the parts of a step of which a head has more than ``UNDIVIDED`` places.

    kept: keys, values, scores and positions. scores: scale_log2 and cap; sizes: constants of both kernels.
    """
    batch, group, v_dim, config = q.shape[0], sizes["G"], sizes["V"], config_for(q, sizes["V"])
    count, ends = parts_of(places, sizes["HK"], config.rows, q.device)
    o = q.new_empty(batch, count, group, v_dim, dtype=torch.float32)
    sums = q.new_empty(batch, count, 2 * group + 1, dtype=torch.float32)
    worst = q.new_empty(batch, count, 2, dtype=torch.int64)
    launch_kernel(
        decode_parts_kernel, batch * count,
        q, *kept, starts, ends, indices, o, sums, worst, q.stride(0), q.stride(2), *scores,
        PART=config.rows, BH=power_of_2(sizes["HK"]), BN=config.columns, **sizes, **config.options,
    )  # fmt: skip
    return Found(config.rows, max(1, JOINED // (sizes["BG"] * sizes["BV"])), o, sums, worst, ends)


@triton.jit
def parts_of_head(part_ends, i_h, HK: tl.constexpr, P: tl.constexpr, PART: tl.constexpr):
    """(the first part of a head, its parts, the parts of all heads)."""
    if part_ends is None:
        parts = i_h * 0 + (P + PART - 1) // PART
        return i_h * parts, parts, parts * HK
    else:
        first = tl.load(part_ends + i_h)
        return first, tl.load(part_ends + i_h + 1) - first, tl.load(part_ends + HK)


@triton.jit
def decode_parts_kernel(
    q, kept_k, kept_v, kept_scores, kept_positions, starts, part_ends, indices, part_o, part_sums, part_worst,
    q_sn, q_sh, scale_log2, cap,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, P: tl.constexpr, PART: tl.constexpr,
    BG: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One program: a row of the batch and one of the S parts of its heads' places, PART of them.

    part_o [N, S, G, V]: sums of values by exp2 of the scores less the largest; part_sums [N, S, 2 G + 1]: those
    largest scores, not yet times the scale, the masses, and the lowest score of a place; part_worst [N, S, 2]: rank
    and number of that place, which the sums leave out (``worst_place``).
    """
    STEP: tl.constexpr = HK if starts is None else 1
    _, of_a_head, all_parts = parts_of_head(part_ends, 0, HK, P, PART)
    i_part = tl.program_id(0) % all_parts
    i_n = (tl.program_id(0) // all_parts).to(tl.int64)
    i_p = i_n
    if indices is not None:
        i_p = tl.load(indices + i_n).to(tl.int64)
        if i_p < 0:
            return
    if starts is None:
        i_h = i_part // of_a_head
        i_first = i_h
        begin = i_part % of_a_head * PART
        count = P
        all_places = P * HK
    else:
        o_end = tl.arange(0, BH)
        b_end = tl.load(part_ends + 1 + o_end, mask=o_end < HK, other=1 << 30)
        i_h = tl.sum((b_end <= i_part).to(tl.int32), 0)
        i_first = tl.load(starts + i_h)
        begin = (i_part - tl.load(part_ends + i_h)) * PART
        count = tl.load(starts + i_h + 1) - i_first
        all_places = tl.load(starts + HK)
    count = tl.minimum(count - begin, PART)
    i_first += begin * STEP
    kept_k = row_of(kept_k, i_p, all_places * D, PAGE) + i_first * D
    kept_v = row_of(kept_v, i_p, all_places * V, PAGE) + i_first * V
    kept_scores = row_of(kept_scores, i_p, all_places, PAGE) + i_first
    kept_positions = row_of(kept_positions, i_p, all_places, PAGE) + i_first

    o_g = tl.arange(0, BG)
    m_g = o_g < G
    o_v = tl.arange(0, BV)
    b_q = load_rows(q + i_n * q_sn + (i_h * G + o_g).to(tl.int64) * q_sh, m_g, D, BD)  # [BG, BD]
    worst, top, place = worst_place(kept_positions, kept_scores, begin, STEP, count, PART)
    b_m = tl.full([BG], float("-inf"), tl.float32)
    b_l = tl.zeros([BG], tl.float32)
    b_o = tl.zeros([BG, BV], tl.float32)
    b_arg = tl.zeros([BG], tl.int32)
    b_m, b_l, b_o = absorb_places(
        b_q, kept_positions, kept_k, kept_v, None, None, place, b_m, b_l, b_o, b_arg, scale_log2, cap, STEP, D, V,
        count, BN, BD, BV, PRECISION, False,
    )  # fmt: skip
    i_out = i_n * all_parts + i_part
    p_o = part_o + (i_out * G + o_g)[:, None] * V + o_v[None, :]
    tl.store(p_o, b_o, mask=m_g[:, None] & (o_v < V)[None, :])
    p_sums = part_sums + i_out * (2 * G + 1)
    tl.store(p_sums + o_g, b_m, mask=m_g)
    tl.store(p_sums + G + o_g, b_l, mask=m_g)
    tl.store(p_sums + 2 * G, worst.to(tl.float32))
    tl.store(part_worst + i_out * 2, top)
    tl.store(part_worst + i_out * 2 + 1, (begin + place).to(tl.int64))


@triton.jit
def choose_among_parts(part_sums, part_worst, score, leaves, parts, G: tl.constexpr, BC: tl.constexpr):
    """``choose_place`` of what the parts of a head would give up."""
    o_c = tl.arange(0, BC)
    m_c = o_c < parts
    b_worst = tl.load(part_sums + o_c * (2 * G + 1) + 2 * G, mask=m_c, other=float("inf"))
    b_top = tl.load(part_worst + o_c * 2, mask=m_c, other=-1)
    b_place = tl.load(part_worst + o_c * 2 + 1, mask=m_c, other=1 << 30).to(tl.int32)
    worst = tl.min(b_worst, 0)
    b_top = tl.where(m_c & (b_worst == worst), b_top, -1)
    top = tl.max(b_top, 0)
    place = tl.min(tl.where(b_top == top, b_place, 1 << 30), 0)
    takes = leaves & ((score > worst) | (top >= EMPTY))
    return tl.where(takes, place, -1), leaves & (top < EMPTY)


@triton.jit
def absorb_parts(
    b_q, part_o, part_sums, part_worst, kept_k, kept_v, p_new_k, p_new_v, place, parts, b_m, b_l, b_o, b_arg,
    scale_log2, cap, STEP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BC: tl.constexpr,
    BJ: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """``absorb_places`` of a head whose ``parts`` are found: first the places that they leave out, then their sums.

    BC: a power of two, at least the parts; BJ: parts that are added at once.
    """
    o_r = tl.arange(0, 16)
    for c in range(0, parts, 16):
        m_r = c + o_r < parts
        b_top = tl.load(part_worst + (c + o_r) * 2, mask=m_r, other=-1)
        b_place = tl.load(part_worst + (c + o_r) * 2 + 1, mask=m_r, other=0)
        new = b_place == place
        m_r = m_r & (new | ((b_top >= 0) & (b_top < EMPTY)))
        p_k = tl.where(new, p_new_k + o_r * 0, kept_k + b_place * (STEP * D))
        p_v = tl.where(new, p_new_v + o_r * 0, kept_v + b_place * (STEP * V))
        if ALIGNED:
            p_k, p_v = tl.multiple_of(p_k, 16), tl.multiple_of(p_v, 16)
        b_k = load_rows(p_k, m_r, D, BD)  # [16, BD]
        b_v = load_rows(p_v, m_r, V, BV)  # [16, BV]
        b_s = capped(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), cap)
        b_s = tl.where(m_r[None, :], b_s, float("-inf"))
        b_m, b_l, b_o, b_arg = absorb(b_s, b_v, b_m, b_l, b_o, b_arg, 0, 1, scale_log2, False, PRECISION)

    o_g = tl.arange(0, BG)
    o_v = tl.arange(0, BV)
    o_c = tl.arange(0, BC)
    m_cg = (o_c < parts)[:, None] & (o_g < G)[None, :]
    b_top = tl.load(part_sums + (o_c * (2 * G + 1))[:, None] + o_g[None, :], mask=m_cg, other=float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_top, 0))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_shrink = tl.exp2((b_m - b_safe) * scale_log2)
    b_l *= b_shrink
    b_o *= b_shrink[:, None]
    o_j = tl.arange(0, BJ)
    for c in range(0, parts, BJ):
        m_j = (c + o_j < parts)[:, None] & (o_g < G)[None, :]
        p_j = part_sums + ((c + o_j) * (2 * G + 1))[:, None] + o_g[None, :]
        b_share = tl.load(p_j, mask=m_j, other=float("-inf"))  # [BJ, BG]
        b_mass = tl.load(p_j + G, mask=m_j, other=0.0)
        p_part = part_o + (((c + o_j) * G)[:, None] + o_g[None, :])[:, :, None] * V + o_v[None, None, :]
        b_part = tl.load(p_part, mask=m_j[:, :, None] & (o_v < V)[None, None, :], other=0.0)  # [BJ, BG, BV]
        b_share = tl.exp2((b_share - b_safe[None, :]) * scale_log2)
        b_l += tl.sum(b_share * b_mass, 0)
        b_o += tl.sum(b_share[:, :, None] * b_part, 0)
    return b_new, b_l, b_o
