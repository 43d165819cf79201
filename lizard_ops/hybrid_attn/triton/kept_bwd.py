"""Backward of kept keys: what queries that see a key beyond its window add to its gradients.

The queries of a sequence are cut into segments. In each, a head has the keys that the segment found alive ("carried",
at most kept_keys) and those that leave the window in it. They are sorted by when they expire there, so that the keys
of a tile have much the same queries. A key's first part goes to its row of dk and dv at once; what it gets in later
segments waits in a buffer and is added by one program, in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.triton.call import FusedOptions
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.kept_index import Index, append, segment_size
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import FAR, Stream, locate_in_stream
from lizard_ops.tiles.softcap import cap_of, cap_slope, capped, units
from lizard_ops.tiles.strided import at, head_step, load_rows, store_rows, strided, time_step
from lizard_ops.window_attn.triton.bwd_keys import RowStats, key_block
from lizard_ops.window_attn.triton.config import WindowCall, config_for


@triton.jit
def beyond(j, end, t, rows, W: tl.constexpr, KB: tl.constexpr, SIZE: tl.constexpr):
    """(first query, end) of the part of a key's life in the segment from t on that the kernel of window keys leaves.

    Queries by their rows among those of the keys, of which there are ``rows``.
    """
    return tl.maximum(j // KB * KB + (KB - 1 + W), t), tl.minimum(end, tl.minimum(t + SIZE, rows))


@triton.jit
def sort_kernel(
    ends, carried, carried_count, at_end, order, order_count, tokens, stream,
    W: tl.constexpr, KB: tl.constexpr, HK: tl.constexpr, SIZE: tl.constexpr, places,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys of a segment by the end of their life in it: the places of carried ones, places + position of others.

    At most one key of a head expires at a query, so each that does here has an entry of its own in ``at_end``
    [segments, HK, SIZE]. Behind them stand those that live on, carried ones first.
    """
    head = tl.program_id(0) % HK
    _, block, batch, first, length = locate_in_stream(tl.program_id(0) // HK, stream, 0, SIZE)
    entry = (tl.program_id(0) // HK).to(tl.int64) * HK + head
    p_ends = ends + (batch.to(tl.int64) * HK + head) * (tokens + stream.prefix) + first
    out = order + entry * (places + SIZE)
    at_end += entry * SIZE
    t = block * SIZE + stream.prefix
    rows = length + stream.prefix
    there = tl.load(carried_count + entry)
    limit = tl.minimum(t + SIZE, rows)
    oldest, newest = tl.maximum(t - W + 1, 0), limit - W  # the keys that leave the window here: oldest <= j < newest
    for i in range(0, SIZE, BLOCK):
        tl.store(at_end + i + tl.arange(0, BLOCK), tl.full([BLOCK], -1, tl.int32), mask=i + tl.arange(0, BLOCK) < SIZE)
    tl.debug_barrier()  # other threads write what this one has
    for i in range(0, there, BLOCK):
        place = i + tl.arange(0, BLOCK)
        j = tl.load(carried + entry * places + place, mask=place < there, other=0)
        end = tl.load(p_ends + j, mask=place < there, other=FAR)
        tl.store(at_end + (end - t), place, mask=end < limit)
    for i in range(oldest, newest, BLOCK):
        j = i + tl.arange(0, BLOCK)
        end = tl.load(p_ends + j, mask=j < newest, other=FAR)
        start, stop = beyond(j, end, t, rows, W, KB, SIZE)
        tl.store(at_end + (end - t), places + j - (t - W + 1), mask=(end < limit) & (start < stop))
    tl.debug_barrier()
    count = t * 0
    for i in range(0, SIZE, BLOCK):
        code = tl.load(at_end + i + tl.arange(0, BLOCK), mask=i + tl.arange(0, BLOCK) < SIZE, other=-1)
        count = append(out, code, code >= 0, count, places + SIZE)
    for i in range(0, there, BLOCK):
        place = i + tl.arange(0, BLOCK)
        j = tl.load(carried + entry * places + place, mask=place < there, other=0)
        end = tl.load(p_ends + j, mask=place < there, other=0)
        count = append(out, place, end >= limit, count, places + SIZE)
    for i in range(oldest, newest, BLOCK):
        j = i + tl.arange(0, BLOCK)
        end = tl.load(p_ends + j, mask=j < newest, other=0)
        start, stop = beyond(j, end, t, rows, W, KB, SIZE)
        count = append(out, places + j - (t - W + 1), (end >= limit) & (start < stop), count, places + SIZE)
    tl.store(order_count + entry, count)


@triton.jit
def kept_key_kernel(
    q, k, v, do, dk, dv, lse, row_term, share, ends, carried, order, order_count, part_k, part_v, segments, tokens,
    stream, scale, cap,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    W: tl.constexpr, KB: tl.constexpr, SIZE: tl.constexpr, places, HB: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of BM sorted keys of one head from the queries of one segment; the last ones, which live
    longest, first.

    The products are those of ``window_backward_keys_kernel``, whose largest scores are never a kept key's.
    """
    G: tl.constexpr = HQ // HK
    at_segment = tl.program_id(0) % (segments * HK)
    head, segment = at_segment % HK, at_segment // HK
    entry = segment.to(tl.int64) * HK + head
    count = tl.load(order_count + entry)
    tile = tl.cdiv(count, BM) - 1 - tl.program_id(0) // (segments * HK)
    if tile < 0:
        return
    _, block, batch, first, length = locate_in_stream(segment, stream, 0, SIZE)
    t0 = block * SIZE + stream.prefix
    o_m = tile * BM + tl.arange(0, BM)
    there = o_m < count
    code = tl.load(order + entry * (places + SIZE) + o_m, mask=there, other=0)
    is_carried = there & (code < places)
    j = tl.load(carried + entry * places + code, mask=is_carried, other=0)
    j = tl.where(is_carried, j, code - places + (t0 - W + 1))
    j = tl.where(there, j, 0)
    p_ends = ends + (batch.to(tl.int64) * HK + head) * (tokens + stream.prefix) + first
    end = tl.load(p_ends + j, mask=there, other=0)
    start, stop = beyond(j, end, t0, length + stream.prefix, W, KB, SIZE)
    lives = there & (start < stop)
    low = tl.min(tl.where(lives, start, FAR), 0)
    high = tl.max(tl.where(lives, stop, 0), 0)
    all_from, all_to = tl.max(tl.where(lives, start, 0), 0), tl.min(tl.where(lives, stop, 0), 0)
    stop = tl.where(lives, stop, 0)
    row = j.to(tl.int64)
    b_k = load_rows(at(k, batch, first, head) + row * time_step(k), there, D, BD)  # [BM, BD]
    b_v = load_rows(at(v, batch, first, head) + row * time_step(v), there, V, BV)  # [BM, BV]
    scale_log2 = units(scale, cap) * LOG2E

    # query tiles: BN // HB tokens, HB heads of the group; neighbours in a tile are neighbours in the row statistics
    TOKENS: tl.constexpr = BN // HB
    SUBS: tl.constexpr = (G + HB - 1) // HB
    o_g, o_t = tl.arange(0, BN) // TOKENS, tl.arange(0, BN) % TOKENS
    o_q = o_t.to(tl.int64) * time_step(q) + o_g.to(tl.int64) * head_step(q)
    o_do = o_t.to(tl.int64) * time_step(do) + o_g.to(tl.int64) * head_step(do)
    o_row = o_t.to(tl.int64) + o_g.to(tl.int64) * tokens
    of_query = first - stream.prefix  # t is a row among those of the keys
    p_q, p_do = at(q, batch, of_query, head * G), at(do, batch, of_query, head * G)
    first_row = (batch.to(tl.int64) * HQ + head * G) * tokens + of_query
    b_dk = tl.zeros([BM, BD], tl.float32)
    b_dv = tl.zeros([BM, BV], tl.float32)
    for i in range(0, tl.cdiv(tl.maximum(high - low, 0), TOKENS) * SUBS):
        t = low + (i // SUBS) * TOKENS
        g = (i % SUBS) * HB
        m_n = o_t < high - t
        if G % HB > 0:
            m_n = m_n & (o_g < G - g)
        t_long = tl.cast(t, tl.int64)
        g_long = tl.cast(g, tl.int64)
        p_row = first_row + t_long + g_long * tokens + o_row
        b_q = load_rows(p_q + t_long * time_step(q) + g_long * head_step(q) + o_q, m_n, D, BD)  # [BN, BD]
        b_do = load_rows(p_do + t_long * time_step(do) + g_long * head_step(do) + o_do, m_n, V, BV)  # [BN, BV]
        b_lse = tl.load(lse + p_row, mask=m_n, other=0.0)
        b_term = tl.load(row_term + p_row, mask=m_n, other=0.0)
        b_s = capped(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION), cap)  # [BM, BN]
        slope = cap_slope(b_s, cap)
        if (t < all_from) | (t + TOKENS > all_to):  # else the queries see all keys
            keep = (t + o_t >= start[:, None]) & (t + o_t < stop[:, None])
            b_s = tl.where(keep, b_s, float("-inf"))
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_pv = b_p
        if share is not None:
            b_share = tl.load(share + p_row, mask=m_n, other=0.0)
            b_dp *= b_share[None, :]
            b_pv = b_p * b_share[None, :]
        b_dv = tl.dot(b_pv.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_term[None, :]) * slope
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    b_dk *= scale
    o_part = entry * places + code
    store_rows(part_k + o_part * D, b_dk, is_carried, D, BD)
    store_rows(part_v + o_part * V, b_dv, is_carried, V, BV)
    add_rows(at(dk, batch, first, head) + row * time_step(dk), b_dk, there & (code >= places), D, BD)
    add_rows(at(dv, batch, first, head) + row * time_step(dv), b_dv, there & (code >= places), V, BV)


@triton.jit
def add_rows(pointers, b_x, mask, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Add [rows, BLOCK] to what stands at row pointers [rows], which no other program touches."""
    there = load_rows(pointers, mask, DIM, BLOCK)
    store_rows(pointers, b_x + there.to(tl.float32), mask, DIM, BLOCK)


@triton.jit
def carried_gradient_kernel(
    ends, carried, carried_count, part_k, part_v, dk, dv, tokens, stream,
    HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, W: tl.constexpr,
    SIZE: tl.constexpr, places, half, bits, BLOCK: tl.constexpr,
):  # fmt: skip
    """What keys got in the segments that found them alive, added up by the first of these. half: the highest bit of
    places, one of ``bits``."""
    tiles = tl.cdiv(places, BLOCK)
    head, tile = tl.program_id(0) // tiles % HK, tl.program_id(0) % tiles
    segment = tl.program_id(0) // (tiles * HK)
    _, block, batch, first, length = locate_in_stream(segment, stream, 0, SIZE)
    entry = segment.to(tl.int64) * HK + head
    place = tile * BLOCK + tl.arange(0, BLOCK)
    mine = place < tl.load(carried_count + entry)
    j = tl.load(carried + entry * places + place, mask=mine, other=0)
    mine = mine & ((tl.maximum(j + (W - stream.prefix), 0) + (SIZE - 1)) // SIZE == block)
    p_ends = ends + (batch.to(tl.int64) * HK + head) * (tokens + stream.prefix) + first
    end = tl.load(p_ends + j, mask=mine, other=0)
    end = tl.minimum(end - stream.prefix, length)  # as a query
    b_dk = tl.zeros([BLOCK, BD], tl.float32)
    b_dv = tl.zeros([BLOCK, BV], tl.float32)
    for i in range(block, tl.cdiv(tl.max(end, 0), SIZE)):
        there = mine & (end > i * SIZE)
        at_segment = entry + tl.cast(i - block, tl.int64) * HK
        found = tl.load(carried_count + at_segment)
        place = tl.zeros([BLOCK], tl.int32)  # keys of the list that stand before j
        for bit in range(bits):
            before = place + (half >> bit)
            inside = there & (before <= found)
            other = tl.load(carried + at_segment * places + before - 1, mask=inside, other=FAR)
            place = tl.where(inside & (other < j), before, place)
        o_part = at_segment * places + place
        b_dk += load_rows(part_k + o_part * D, there, D, BD)
        b_dv += load_rows(part_v + o_part * V, there, V, BV)
    row = j.to(tl.int64)
    add_rows(at(dk, batch, first, head) + row * time_step(dk), b_dk, mine, D, BD)
    add_rows(at(dv, batch, first, head) + row * time_step(dv), b_dv, mine, V, BV)


def kept_key_gradients(
    x: WindowCall, options: FusedOptions, do: Tensor, stats: RowStats, found: tuple[Tensor, Tensor], index: Index,
    stream: Stream, shape: FusedShape,
) -> None:  # fmt: skip
    """Add to (dk, dv) of ``key_gradients``, whose rows' statistics these are, what kept keys get beyond it."""
    q, k, v = x.q, x.k, x.v
    (segments, heads, places), tokens = index.carried.shape, q.shape[1]
    c, segment = config_for("keys", q, v, shape.group), segment_size()
    size = key_block(c, shape.anchors)
    if not segments or not tokens:
        return
    make = {"device": q.device}
    order = torch.empty(segments, heads, places + segment, dtype=torch.int32, **make)
    at_end = torch.empty(segments, heads, segment, dtype=torch.int32, **make)
    order_count = torch.empty(segments, heads, dtype=torch.int32, **make)
    part_k, part_v = (
        torch.empty(segments, heads, places, dim, dtype=torch.float32, **make) for dim in (shape.dim, shape.value)
    )
    of_lists = (index.ends, index.carried, index.carried_count)
    launch_kernel(
        sort_kernel, segments * heads,
        *of_lists, at_end, order, order_count, tokens, stream, shape.window, size, heads, segment, places, 256,
        num_warps=4,
    )  # fmt: skip
    dk, dv = (strided(x) for x in found)
    dims = (shape.dim, shape.dim_block, shape.value, shape.value_block)
    tiles = triton.cdiv(places + segment, c.rows)
    launch_kernel(
        kept_key_kernel, tiles * segments * heads,
        strided(q), strided(k), strided(v), strided(do), dk, dv, stats.lse, stats.term, stats.share, index.ends,
        index.carried, order, order_count, part_k, part_v, segments, tokens, stream, options.scale,
        cap_of(options.scale, options.softcap), shape.query_heads, heads, *dims, shape.window, size, segment, places,
        c.heads, c.rows, c.columns, "ieee" if q.dtype == torch.float32 else "tf32", **c.options,
    )  # fmt: skip
    block = 16
    launch_kernel(
        carried_gradient_kernel, segments * heads * triton.cdiv(places, block),
        *of_lists, part_k, part_v, dk, dv, tokens, stream, heads, *dims, shape.window, segment, places,
        1 << (places.bit_length() - 1), places.bit_length(), block, num_warps=4,
    )  # fmt: skip
