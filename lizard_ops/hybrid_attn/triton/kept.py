"""Keys that outlive their window: what the kernels are told of them, and tiles of them."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Kept(NamedTuple):
    """Which keys live on. Rows are those of the keys: of a carried state its kept keys in order of position
    and its ring, then the new ones. An end is the row of the first query that no longer sees the key exactly.

    Of a block of queries (``size`` of them, as ``locate_in_stream`` numbers blocks) the list holds the keys that have
    left the window of its first query and are alive there, in order of position. Those that leave it later in the block
    are among the rows that its window loads anyway.
    """

    ends: Tensor  # [B, Hk, rows] int32; 0 for anchors, padding and what is no key
    alive: Tensor  # [blocks, Hk, places] int32
    count: Tensor  # [blocks, Hk] int32 keys in the list
    places: int  # room in a list; layers may differ in it, so that no kernel is compiled for one


@triton.jit
def kept_list(living, block, head, HK: tl.constexpr):
    """(the first key of a block's list, how many there are)."""
    entry = tl.cast(block, tl.int64) * HK + head
    return living.alive + entry * living.places, tl.load(living.count + entry)


@triton.jit
def kept_keys(p_alive, p_ends, j, alive, BN: tl.constexpr):
    """Keys j to j + BN of a list: (row, whether there is one, its end)."""
    i = j + tl.arange(0, BN)
    there = i < alive
    c = tl.load(p_alive + i, mask=there, other=0)
    return c.to(tl.int64), there, tl.load(p_ends + c, mask=there, other=0)


@triton.jit
def outlives(own, c, p_ends, keys):
    """[query, key]: key c has an end, which is still to come."""
    ends = tl.load(p_ends + c, mask=(c >= 0) & (c < keys), other=0)
    return (c[None, :] <= own[:, None]) & (own[:, None] < ends[None, :])


@triton.jit
def largest(score, index, top, top_key):
    """Running maximum of each row and the index of its column, as ``softmax_step`` finds them."""
    tile_top = tl.max(score, 1)
    tile_key = tl.max(tl.where(score == tile_top[:, None], index[None, :], -(1 << 30)), 1)
    return tl.maximum(top, tile_top), tl.where(tile_top > top, tile_key, top_key)
