"""Which keys live where: built once a call, and what moves rows into the order in which keys expire."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.kept import Kept
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.places import FAR, Stream, locate_in_stream, stream_blocks
from lizard_ops.tiles.strided import at, strided, strided_heads
from lizard_ops.tiles.widths import power_of_two

SEGMENT = 512  # queries between two of the lists that are made by going through all keys


class Index(NamedTuple):
    """What every kernel of a call reads of its expiries."""

    ends: Tensor  # [B, Hk, rows] int32, as ``Kept.ends``
    source: Tensor  # [B, Hk, T] int32 the row of the key that enters the sums at each query, -1 for none
    alive: Tensor  # [blocks, Hk, places] int32 of blocks of queries, as ``Kept.alive``
    count: Tensor  # [blocks, Hk] int32
    carried: Tensor  # [segments, Hk, places] int32 the same of segments
    carried_count: Tensor  # [segments, Hk] int32
    left: Tensor  # [B, Hk, rows] int32, the row at which each key enters the sums, as ``ends``; empty: its end

    @property
    def entries(self) -> Tensor:
        """At which row each key enters the sums, 0 for those that never do."""
        return self.left if self.left.numel() else self.ends

    @property
    def kept(self) -> Kept:
        return Kept(self.ends, self.alive, self.count, self.alive.shape[2])


@triton.jit
def ends_kernel(
    expiry, ends, source, left, tokens, stream, ANCHORS: tl.constexpr, W: tl.constexpr, HK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The end of each key, and the key that enters the sums at each query: when it expires, or, with ``left``, when it
    leaves the window, which keys before the prefix's last W have. Expiries count from the first query; below 0 is no
    key."""
    head = tl.program_id(0) % HK
    _, block, batch, first, length = locate_in_stream(tl.program_id(0) // HK, stream, stream.prefix, BLOCK)
    j = block * BLOCK + tl.arange(0, BLOCK)
    rows = length + stream.prefix
    is_key = j < rows
    if stream.position is None:
        is_key = is_key & (j >= ANCHORS)
    p_expiry = at(expiry, batch, first, head) + j.to(tl.int64) * expiry.time
    end = tl.load(p_expiry, mask=is_key, other=-1)
    is_key = is_key & (end >= 0)
    end = tl.where(is_key, tl.minimum(end, FAR) + stream.prefix, 0).to(tl.int32)
    head_row = batch.to(tl.int64) * HK + head
    tl.store(ends + head_row * (tokens + stream.prefix) + first + j, end, mask=j < rows)
    if left is not None:
        is_key = is_key & (j >= stream.prefix - W)
        end = tl.where(is_key, j + W, 0)
        tl.store(left + head_row * (tokens + stream.prefix) + first + j, end, mask=j < rows)
    tl.store(source + head_row * tokens + first + end - stream.prefix, j, mask=is_key & (end < rows))


@triton.jit
def append(pointer, keys, chosen, count, limit):
    """Put the chosen keys behind the ``count`` that a list has; its length then."""
    place = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(pointer + place, keys, mask=chosen & (place < limit))
    return count + tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def end_list(pointer, p_count, count, places, BLOCK: tl.constexpr):
    """Note how many keys a list has; -1 in the places behind them."""
    for j in range(count, places, BLOCK):
        place = j + tl.arange(0, BLOCK)
        tl.store(pointer + place, tl.full([BLOCK], -1, tl.int32), mask=place < places)
    tl.store(p_count, tl.minimum(count, places))


@triton.jit
def carried_kernel(
    ends, carried, count_out, tokens, stream, W: tl.constexpr, HK: tl.constexpr, SIZE: tl.constexpr,
    places, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys that a segment of SIZE queries finds alive and out of the window."""
    head = tl.program_id(0) % HK
    segment = tl.program_id(0) // HK
    _, block, batch, first, length = locate_in_stream(segment, stream, 0, SIZE)
    t = block * SIZE + stream.prefix
    entry = segment.to(tl.int64) * HK + head
    p_ends = ends + (batch.to(tl.int64) * HK + head) * (tokens + stream.prefix) + first
    count = t * 0
    if t < length + stream.prefix:
        for j in range(0, t - W + 1, BLOCK):
            c = j + tl.arange(0, BLOCK)
            end = tl.load(p_ends + c, mask=c <= t - W, other=0)
            count = append(carried + entry * places, c, end > t, count, places)
    end_list(carried + entry * places, count_out + entry, count, places, BLOCK)


@triton.jit
def alive_kernel(
    ends, carried, carried_count, alive, count_out, tokens, stream, W: tl.constexpr, HK: tl.constexpr,
    SIZE: tl.constexpr, SEGMENT: tl.constexpr, places, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of a block of SIZE queries: who is left of its segment's, and who has left the window since."""
    head = tl.program_id(0) % HK
    pid = tl.program_id(0) // HK
    n, block, batch, first, length = locate_in_stream(pid, stream, 0, SIZE)
    t = block * SIZE + stream.prefix
    entry = tl.cast(pid, tl.int64) * HK + head
    p_ends = ends + (batch.to(tl.int64) * HK + head) * (tokens + stream.prefix) + first
    out = alive + entry * places
    count = t * 0
    if t < length + stream.prefix:
        start = block * SIZE // SEGMENT
        if stream.cu_seqlens is not None:
            before = first // SEGMENT + n + start
        else:
            before = n * tl.cdiv(stream.length, SEGMENT) + start
        from_segment = tl.cast(before, tl.int64) * HK + head
        there = tl.load(carried_count + from_segment)
        for j in range(0, there, BLOCK):
            i = j + tl.arange(0, BLOCK)
            c = tl.load(carried + from_segment * places + i, mask=i < there, other=0)
            end = tl.load(p_ends + c, mask=i < there, other=0)
            count = append(out, c, end > t, count, places)
        for j in range(tl.maximum(start * SEGMENT + stream.prefix - W + 1, 0), t - W + 1, BLOCK):
            c = j + tl.arange(0, BLOCK)
            end = tl.load(p_ends + c, mask=c <= t - W, other=0)
            count = append(out, c, end > t, count, places)
    end_list(out, count_out + entry, count, places, BLOCK)


@triton.jit
def move_kernel(
    x, out, index, rows, stream, before, LEAST: tl.constexpr, HK: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = x[index[row] - before], zeros where index[row] is no row of keys from LEAST on.

    out and index [B, HK, rows] have ``before`` rows more than there are queries.
    """
    head = tl.program_id(0) % HK
    _, block, batch, first, length = locate_in_stream(tl.program_id(0) // HK, stream, before, BLOCK)
    r, d = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BD)
    there = r < length + before
    row = tl.load(index + (batch.to(tl.int64) * HK + head) * rows + first + r, mask=there, other=-1)
    there = (row >= LEAST) & (row < length + stream.prefix)
    row -= before
    p_x = at(x, batch, first, head) + row.to(tl.int64)[:, None] * (x.time * x.unit) + d[None, :]
    moved = tl.load(p_x, mask=there[:, None] & (d < DIM)[None, :], other=0.0)
    p_out = at(out, batch, first, head) + r.to(tl.int64)[:, None] * (out.time * out.unit) + d[None, :]
    tl.store(p_out, moved, mask=(r < length + before)[:, None] & (d < DIM)[None, :])


def index_of(expiry: Tensor, places: int, stream: Stream, shape: FusedShape, late: bool = True) -> Index:
    """Of expiries [B, rows, Hk] that keep at most ``places`` keys of a head alive beyond window and anchors.

    late: keys enter the sums when they expire, else when they leave the window.
    """
    batch, rows, heads = expiry.shape
    tokens = rows - stream.prefix
    size, places = block_size(shape), list_length(places)
    make = {"dtype": torch.int32, "device": expiry.device}
    ends = torch.zeros(batch, heads, rows, **make)
    source = torch.full((batch, heads, tokens), -1, **make)
    left = torch.empty(0, **make) if late else torch.zeros(batch, heads, rows, **make)
    blocks, segments = stream_blocks(stream, 0, size), stream_blocks(stream, 0, SEGMENT)
    alive, count = torch.empty(blocks, heads, places, **make), torch.empty(blocks, heads, **make)
    carried, carried_count = torch.empty(segments, heads, places, **make), torch.empty(segments, heads, **make)
    programs = stream_blocks(stream, stream.prefix, 256) * heads
    if programs and tokens:
        launch_kernel(
            ends_kernel, programs,
            strided_heads(expiry), ends, source, None if late else left, tokens, stream, shape.anchors, shape.window,
            heads, 256, num_warps=4,
        )  # fmt: skip
        launch_kernel(
            carried_kernel, segments * heads,
            ends, carried, carried_count, tokens, stream, shape.window, heads, SEGMENT, places, 2048, num_warps=8,
        )  # fmt: skip
        launch_kernel(
            alive_kernel, blocks * heads,
            ends, carried, carried_count, alive, count, tokens, stream, shape.window, heads, size, SEGMENT, places, 256,
            num_warps=2,
        )  # fmt: skip
    return Index(ends, source, alive, count, carried, carried_count, left)


def empty_index(expiry: Tensor, places: int, stream: Stream, shape: FusedShape, late: bool) -> Index:
    """The shapes of ``index_of``, for tracing."""
    (batch, length, heads), make = expiry.shape, {"dtype": torch.int32, "device": expiry.device}
    rows, queries = (torch.empty(batch, heads, n, **make) for n in (length, length - stream.prefix))
    lists = []
    for size in (block_size(shape), SEGMENT):
        blocks = stream_blocks(stream, 0, size)
        lists += [torch.empty(blocks, heads, list_length(places), **make), torch.empty(blocks, heads, **make)]
    return Index(rows, queries, *lists, torch.empty(0, **make) if late else torch.empty_like(rows))


def segment_size() -> int:
    return SEGMENT


def block_size(shape: FusedShape) -> int:
    """Queries that share a list: a block of the output kernel."""
    return shape.stack(shape.config("output").rows)[0]


def list_length(places: int) -> int:
    return max(16, triton.cdiv(places, 16) * 16)


def entering(x: Tensor, source: Tensor, stream: Stream) -> Tensor:
    """Rows of x [B, rows, Hk, dim] in the order in which their keys expire; zeros where none does."""
    return _moved(x, source, stream, 0, 0)


def from_entering(x: Tensor, ends: Tensor, stream: Stream) -> Tensor:
    """The way back, [B, T, Hk, dim] to [B, rows, Hk, dim]; zeros for keys that do not expire."""
    return _moved(x, ends, stream, 1, stream.prefix)


def _moved(x: Tensor, index: Tensor, stream: Stream, least: int, prefix: int) -> Tensor:
    """prefix: rows of ``out`` before that of the first query, whose row in x is 0 then."""
    (batch, _, heads, dim), rows = x.shape, index.shape[2]
    out = torch.empty(batch, rows, heads, dim, dtype=x.dtype, device=x.device)
    blocks = stream_blocks(stream, prefix, 32)
    if blocks and x.numel():
        launch_kernel(
            move_kernel, blocks * heads,
            strided(x), strided(out), index, rows, stream, prefix, least, heads, dim, power_of_two(dim), 32,
            num_warps=4,
        )  # fmt: skip
    return out.zero_() if not x.numel() else out
