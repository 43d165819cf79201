"""Key expiry in four kernels, parallel over blocks of keys because a best P is a semilattice:
best(best(X) + Y) = best(X + Y).

``best_kernel`` sorts every block, ``scan_kernel`` finds the best P before each block from those, ``displaced_kernel``
finds for every block at once which of the best before it and of its own keys are displaced in it, and ``last_kernel``
whom the final state keeps. Ranks are those of ``key_expiry.stream``: whole numbers, no two the same, so that no order
of sums or comparisons shows. Each key is displaced in one block alone, whose program writes it: no atomics.

H heads, R rows of all streams, C keys in a block, P places, BP a power of two no less. Layers may differ in P, so it is
an argument like others: no kernel is compiled for it. A stream has ``length`` rows, or the rows between two of
``ends``; its blocks are numbered as ``tiles.places.locate_in_rows`` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.tiles.places import locate_in_rows

LOWEST = tl.constexpr(-(2**63 - 1))
LAST = tl.constexpr(2**31 - 1)
NEVER = tl.constexpr(2**62)


@triton.jit
def first_block(n, ends, length, C: tl.constexpr, PACKED: tl.constexpr):
    """(number of a stream's first block, first of its rows, rows)."""
    if PACKED:
        bos = tl.load(ends + n).to(tl.int64)
        rows = (tl.load(ends + n + 1).to(tl.int64) - bos).to(tl.int32)
        return (bos // C).to(tl.int32) + n, bos, rows
    else:
        return n * tl.cdiv(length, C), n.to(tl.int64) * length, length + n * 0


@triton.jit(do_not_specialize=["P"])
def rank_kernel(
    scores, ranks, by_row, lengths, R, length, n_step, t_step, h_step,
    ANCHORS: tl.constexpr, P, H: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ranks of rows [N, T, H] that nothing came before, as ``key_expiry.stream`` gives them, and by_row for no row."""
    i_n, i_block = tl.program_id(0) // tl.cdiv(length, BLOCK), tl.program_id(0) % tl.cdiv(length, BLOCK)
    t, h = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BH)
    rows = length
    if lengths is not None:
        rows = tl.load(lengths + i_n).to(tl.int32)
    there = (t < length)[:, None] & (h < H)[None, :]
    p_scores = scores + i_n.to(tl.int64) * n_step + t.to(tl.int64)[:, None] * t_step + h[None, :] * h_step
    b_score = tl.load(p_scores, mask=there, other=0.0)
    bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)  # -0 is 0
    bits = tl.where(bits < 0, bits ^ LAST, bits)
    rank = bits.to(tl.int64) * (1 << 32) + ((t + P) ^ LAST)[:, None]  # LAST less its number
    rank = tl.where(((t >= ANCHORS) & (t < rows))[:, None], rank, LOWEST)
    out = h.to(tl.int64)[None, :] * R + i_n.to(tl.int64) * length + t[:, None]
    tl.store(ranks + out, rank, mask=there)
    tl.store(by_row + out, tl.full([BLOCK, BH], -1, tl.int32), mask=there)


@triton.jit
def tell_kernel(
    by_row, expiry, R, length, W: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Expiries [N, T, H] of the rows that displace each key [H, N T]."""
    i_n, i_block = tl.program_id(0) // tl.cdiv(length, BLOCK), tl.program_id(0) % tl.cdiv(length, BLOCK)
    t, h = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BH)
    there = (t < length)[:, None] & (h < H)[None, :]
    row = i_n.to(tl.int64) * length + t
    b_row = tl.load(by_row + h.to(tl.int64)[None, :] * R + row[:, None], mask=there, other=-1).to(tl.int64)
    tl.store(expiry + row[:, None] * H + h[None, :], tl.where(b_row < 0, NEVER, b_row + W), mask=there)


@triton.jit
def best_kernel(
    ranks, best, ends, R, length, n, steps,
    H: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """best [blocks, H, C]: a block's ranks, ascending."""
    block, h = tl.program_id(0) // H, tl.program_id(0) % H
    i_n, i_block, bos, rows = locate_in_rows(block, ends, length, n, steps, 1, 0, C, PACKED)
    c = tl.arange(0, C)
    row = i_block * C + c
    if not PACKED:
        bos = i_n.to(tl.int64) * length
    b_x = tl.load(ranks + h.to(tl.int64) * R + bos + row, mask=row < rows, other=LOWEST)
    tl.store(best + (block.to(tl.int64) * H + h) * C + c, tl.sort(b_x))


@triton.jit(do_not_specialize=["P"])
def scan_kernel(
    kept, best, before, ends, length,
    H: tl.constexpr, P, BP: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """before [blocks, H, BP]: the best P of all keys before a block, descending; kept [N, H, P] those before row 0."""
    i_n, h = tl.program_id(0) // H, tl.program_id(0) % H
    block, _, rows = first_block(i_n, ends, length, C, PACKED)
    o = tl.arange(0, BP)
    b_kept = tl.full([BP], LOWEST, tl.int64)
    if kept is not None:
        b_kept = tl.load(kept + (i_n.to(tl.int64) * H + h) * P + o, mask=o < P, other=LOWEST)
    at = (block.to(tl.int64) * H + h) * BP + o
    best += (block.to(tl.int64) * H + h) * C + (C - BP) + o
    blocks = tl.cdiv(rows, C)
    b_new = tl.load(best, mask=o < blocks * BP, other=LOWEST)
    for i in range(blocks):
        tl.store(before + at, b_kept)
        at += H * BP
        best += H * C
        b_next = tl.load(best, mask=o < (blocks - 1 - i) * BP, other=LOWEST)  # on its way while the others merge
        # the larger of the i-th best and the i-th worst: of two sorted lists, that is the best half of both
        b_kept = merged(tl.maximum(b_kept, b_new), BP, LEVELS)
        b_kept = tl.where(o < P, b_kept, LOWEST)
        b_new = b_next


@triton.jit
def merged(b_x, BP: tl.constexpr, LEVELS: tl.constexpr):
    """BP = 2 ** LEVELS numbers that fall and then rise, or rise and then fall, in falling order: the last steps of a
    bitonic sort."""
    for i in tl.static_range(LEVELS):
        b_x = tl.reshape(b_x, [1 << i, 2, BP >> (i + 1)])
        b_other = b_x ^ tl.xor_sum(b_x, 1, True)  # of the same pair
        is_left = (tl.arange(0, 2) == 0)[None, :, None]
        b_x = tl.reshape(tl.where((b_x > b_other) == is_left, b_x, b_other), [BP])
    return b_x


@triton.jit
def come_to(b_x, b_new, b_lacking):
    """At which of the new keys [C] as many better ones have come as each key of b_x [X] lacks; C if at none."""
    b_come = tl.cumsum((b_new[None, :] > b_x[:, None]).to(tl.int32), 1)
    return tl.sum((b_come < b_lacking[:, None]).to(tl.int32), 1)


@triton.jit
def better(b_x, b_new):
    """How many of the keys b_new [C] are better than each of b_x [X]."""
    return tl.sum((b_new[None, :] > b_x[:, None]).to(tl.int32), 1)


@triton.jit(do_not_specialize=["P"])
def displaced_kernel(
    ranks, best, before, by_kept, by_row, ends, R, length, n, steps,
    H: tl.constexpr, P, BP: tl.constexpr, C: tl.constexpr, X: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The row at which a key is displaced, of keys displaced in this block: of kept keys, by number, and of rows.

    Both go by in the order of their ranks, X at a time, and each of PARTS programs takes every PARTS-th X. Who is
    displaced at all is a count; when, which takes longer, is asked for no X of which none is, or each by its own row.
    """
    part = tl.program_id(0) % PARTS * X
    block, h = tl.program_id(0) // PARTS // H, tl.program_id(0) // PARTS % H
    i_n, i_block, bos, rows = locate_in_rows(block, ends, length, n, steps, 1, 0, C, PACKED)
    if not PACKED:
        bos = i_n.to(tl.int64) * length
    first = i_block * C
    if first < rows:
        c = tl.arange(0, C)
        x = tl.arange(0, X)
        o = tl.arange(0, BP)
        ranks += h.to(tl.int64) * R + bos
        best += (block.to(tl.int64) * H + h) * C
        before += (block.to(tl.int64) * H + h) * BP
        by_row += h.to(tl.int64) * R + bos
        if by_kept is not None:
            by_kept += (i_n.to(tl.int64) * H + h) * P
        b_new = tl.load(ranks + first + c, mask=first + c < rows, other=LOWEST)
        # the best before the block, P - place better ones short of being displaced
        for start in range(part, P, X * PARTS):
            place = start + x
            b_x = tl.load(before + place, mask=place < P, other=LOWEST)
            gone = (b_x != LOWEST) & (better(b_x, b_new) >= P - place)
            if tl.max(gone.to(tl.int32), 0) > 0:
                b_at = first + come_to(b_x, b_new, P - place)
                number = ((b_x & LAST) ^ LAST).to(tl.int32)  # LAST less it
                if by_kept is not None:
                    tl.store(by_kept + number, b_at, mask=gone & (number < P))
                tl.store(by_row + (number - P), b_at, mask=gone & (number >= P))
        b_kept = tl.load(before + o)
        for start in range(part, C, X * PARTS):
            b_x = tl.load(best + start + x)
            row = ((b_x & LAST) ^ LAST).to(tl.int32) - P
            lacking = P - better(b_x, b_kept)
            gone = (b_x != LOWEST) & (better(b_x, b_new) >= lacking)
            tl.store(by_row + row, row, mask=gone & (lacking <= 0))
            gone = gone & (lacking > 0)
            if tl.max(gone.to(tl.int32), 0) > 0:
                tl.store(by_row + row, tl.maximum(first + come_to(b_x, b_new, lacking), row), mask=gone)


@triton.jit(do_not_specialize=["P"])
def last_kernel(
    ranks, kept, before, judged, last, ends, R, length,
    H: tl.constexpr, P, BP: tl.constexpr, C: tl.constexpr, X: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """last [N, H, P]: the best P of the kept keys and the first ``judged`` rows [N], descending."""
    i_n, h = tl.program_id(0) // H, tl.program_id(0) % H
    block, bos, _ = first_block(i_n, ends, length, C, PACKED)
    limit = tl.load(judged + i_n).to(tl.int32)
    first = limit // C * C
    c = tl.arange(0, C)
    x = tl.arange(0, X)
    o = tl.arange(0, BP)
    ranks += h.to(tl.int64) * R + bos + first
    kept += (i_n.to(tl.int64) * H + h) * P
    last += (i_n.to(tl.int64) * H + h) * P
    before += ((block + limit // C).to(tl.int64) * H + h) * BP
    b_new = tl.load(ranks + c, mask=first + c < limit, other=LOWEST)
    b_kept = tl.load(kept + o, mask=o < P, other=LOWEST)
    if limit >= C:
        b_kept = tl.load(before + o)
    if limit == 0:
        tl.store(last + o, b_kept, mask=o < P)
    else:
        for start in range(0, BP, X):
            place = start + x
            b_x = tl.load(kept + place, mask=place < P, other=LOWEST)
            if limit >= C:
                b_x = tl.load(before + place)
            b_place = place + tl.sum((b_new[None, :] > b_x[:, None]).to(tl.int32), 1)
            tl.store(last + b_place, b_x, mask=(b_x != LOWEST) & (b_place < P))
        for start in range(0, C, X):
            own = start + x
            b_x = tl.load(ranks + own, mask=first + own < limit, other=LOWEST)
            b_place = tl.sum((b_kept[None, :] > b_x[:, None]).to(tl.int32), 1)
            b_place += tl.sum((b_new[None, :] > b_x[:, None]).to(tl.int32), 1)
            tl.store(last + b_place, b_x, mask=(b_x != LOWEST) & (b_place < P))
