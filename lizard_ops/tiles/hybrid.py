"""What the hybrid kernels share: where sequences stand, addresses, feature tiles and decay tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
GATE_FLOOR = tl.constexpr(-200.0)  # log2 of a decay that is zero in float32; a chunk of them still sums exactly


class Rows(NamedTuple):
    """A tensor [B, T, H, dim] of any strides but a unit last one.

    Strides are in steps of ``unit`` elements. Of an argument Triton knows only whether 16 divides it: without the unit,
    rows of 40 would be loaded number by number.
    """

    ptr: Tensor
    batch: int
    time: int
    head: int
    unit: tl.constexpr


class Stream(NamedTuple):
    """Where queries and keys stand.

    A sequence of L queries has prefix + L rows of k and v, the prefix older than query 0. Its linear rows are
    those of k and v from ``start`` on, and row r of fk and g is linear row r. Query t sees the linear
    rows up to t - shift.
    """

    cu_seqlens: Tensor | None  # [N + 1] ends of packed sequences
    lengths: Tensor | None  # [N] queries of each right-padded row
    position: Tensor | None  # [N] of query 0 with a carried state
    ends: int  # N + 1, which is never the 1 that Triton would compile a kernel of its own for
    length: int  # queries in a batch row
    prefix: int
    shift: int
    start: int


def rows(x: Tensor) -> Rows:
    """The tensor as kernels take it; copied if its last stride is not one."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    unit = math.gcd(8, *x.stride()[:3])
    return Rows(x, x.stride(0) // unit, x.stride(1) // unit, x.stride(2) // unit, tl.constexpr(unit))


def head_rows(x: Tensor) -> Rows:
    """A tensor [B, T, H] as rows of one channel."""
    return Rows(x, *x.stride(), tl.constexpr(1))


def block_count(stream: Stream, extra: int, block: int) -> int:
    """Programs that ``locate`` spreads over all sequences, each of its length + extra rows."""
    if stream.cu_seqlens is None:
        return (stream.ends - 1) * max(0, triton.cdiv(stream.length + extra, block))
    return (stream.length + (stream.ends - 1) * extra) // block + stream.ends - 1


def head_lead(offset: int, block: int) -> int:
    """Rows to put before row 0 so that row ``offset`` starts a block."""
    return -offset % block


def slot_count(stream: Stream, chunk: int) -> int:
    """Chunks over all sequences."""
    return block_count(stream, -stream.shift if stream.cu_seqlens is None else 0, chunk)


def power_of_two(dim: int, *beside: int) -> int:
    """Tile width for a dimension: a power of two that tensor cores take.

    Never 16 where a dimension ``beside`` it is over 64: products of such tiles read out of bounds (docs/kernels.md).
    """
    return max(32 if max(beside, default=0) > 64 else 16, triton.next_power_of_2(dim))


@triton.jit
def sequence(n, stream):
    """(batch row, first query in it, queries) of sequence n."""
    if stream.cu_seqlens is not None:
        first = tl.load(stream.cu_seqlens + n).to(tl.int32)
        return n * 0, first, tl.load(stream.cu_seqlens + n + 1).to(tl.int32) - first
    elif stream.lengths is not None:
        return n, n * 0, tl.load(stream.lengths + n).to(tl.int32)
    else:
        return n, n * 0, n * 0 + stream.length


@triton.jit
def locate(pid, stream, EXTRA, BLOCK: tl.constexpr):
    """(sequence, block of its length + EXTRA rows, batch row, first query in it, queries).

    When packed, the blocks of sequence n start at (rows before it) // BLOCK + n: every sequence gets enough, some
    one too many, and nothing has to be counted on the host.
    """
    if stream.cu_seqlens is not None:
        n = pid * 0
        high = n + stream.ends - 1
        while high - n > 1:
            middle = (n + high) // 2
            before = tl.load(stream.cu_seqlens + middle).to(tl.int32)
            left = (before + middle * EXTRA) // BLOCK + middle <= pid
            n = tl.where(left, middle, n)
            high = tl.where(left, high, middle)
        batch, first, length = sequence(n, stream)
        return n, pid - ((first + n * EXTRA) // BLOCK + n), batch, first, length
    else:
        blocks = tl.cdiv(stream.length + EXTRA, BLOCK)
        n = pid // blocks
        batch, first, length = sequence(n, stream)
        return n, pid % blocks, batch, first, length


@triton.jit
def locate_chunk(slot, stream, C: tl.constexpr):
    """``locate`` for chunks of the linear rows that some query sees."""
    if stream.cu_seqlens is not None:
        return locate(slot, stream, 0, C)
    else:
        return locate(slot, stream, -stream.shift, C)


@triton.jit
def first_slot(n, first, stream, C: tl.constexpr):
    """Slot of the first chunk of a sequence in the buffers that hold one entry a chunk."""
    if stream.cu_seqlens is not None:
        return first // C + n
    else:
        return n * tl.cdiv(tl.maximum(stream.length - stream.shift, 0), C)


@triton.jit
def first_rows(n, first, stream, ANCHORS: tl.constexpr):
    """Of a sequence: first row in k and v, in fk and g; first valid key row and first key row past the anchors."""
    key_row = first
    linear_row = first
    if stream.cu_seqlens is not None:
        key_row += n * stream.prefix
        linear_row += n * (stream.prefix - stream.start)
    valid = first * 0
    behind = valid + ANCHORS
    if stream.position is not None:
        seen = tl.load(stream.position + n)
        valid = tl.maximum(stream.prefix - seen, 0).to(tl.int32)
        behind = tl.maximum(stream.prefix + ANCHORS - seen, 0).to(tl.int32)
    return key_row, linear_row, valid, behind


@triton.jit
def at(x, batch, row, head):
    """Address of channel 0 of one row of a ``Rows``."""
    steps = batch.to(tl.int64) * x.batch + row.to(tl.int64) * x.time + head.to(tl.int64) * x.head
    return x.ptr + steps * x.unit


@triton.jit
def time_step(x):
    """Elements from one row of a ``Rows`` to the next."""
    return x.time * x.unit


@triton.jit
def head_step(x):
    """Elements from one head of a ``Rows`` to the next."""
    return x.head * x.unit


@triton.jit
def at_anchors(x, n, batch, key_row, head, OWN: tl.constexpr):
    """Address of a sequence's first anchor: a tensor of its own, or the first rows of k or v (OWN)."""
    if OWN:
        return at(x, batch, key_row, head)
    else:
        return at(x, n, n * 0, head)


@triton.jit
def load_tile(pointer, stride, row, length, BR: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr):
    """Rows ``row`` to ``row + BR`` of a sequence as [BR, BD], zero outside of it; pointer is at row 0."""
    r = row + tl.arange(0, BR)
    d = tl.arange(0, BD)
    mask = ((r >= 0) & (r < length))[:, None]
    if DIM != BD:
        mask = mask & (d < DIM)[None, :]
    first = pointer + row.to(tl.int64) * stride
    return tl.load(first + (tl.arange(0, BR) * stride)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_stack(
    x, batch, first, head, t, i, member, inside, BM: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Queries t + i of heads ``head`` + ``member`` as [BM, BD], zero where not ``inside``."""
    d = tl.arange(0, BD)
    mask = inside[:, None]
    if DIM != BD:
        mask = mask & (d < DIM)[None, :]
    p = at(x, batch, first + t, head) + (i * time_step(x) + member * head_step(x))[:, None] + d[None, :]
    return tl.load(p, mask=mask, other=0.0)


@triton.jit
def load_tile_transposed(pointer, stride, row, length, BR: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr):
    """The same rows as columns, [BD, BR]."""
    r = row + tl.arange(0, BR)
    d = tl.arange(0, BD)
    mask = ((r >= 0) & (r < length))[None, :]
    if DIM != BD:
        mask = mask & (d < DIM)[:, None]
    first = pointer + row.to(tl.int64) * stride
    return tl.load(first + (tl.arange(0, BR) * stride)[None, :] + d[:, None], mask=mask, other=0.0)


@triton.jit
def half_features(x, sign, FP: tl.constexpr, BF: tl.constexpr, AXIS: tl.constexpr, MAP: tl.constexpr):
    """softmax(sign x) or exp(sign x - max |x|) of a tile of pre-activations, float32; finished features as they are."""
    if MAP == "exp":
        return exponential(x, sign, FP, BF, AXIS)
    x = x.to(tl.float32)
    if MAP == "softmax":
        scale = sign * LOG2E
        if FP != BF:
            x = tl.where(tl.expand_dims(tl.arange(0, BF) < FP, 1 - AXIS), x, sign * float("-inf"))
        x = tl.exp2(x * scale - tl.max(x * sign, AXIS, keep_dims=True) * LOG2E)
        return x * (1.0 / tl.sum(x, AXIS, keep_dims=True))
    else:
        return x


@triton.jit
def exponential(x, sign, FP: tl.constexpr, BF: tl.constexpr, AXIS: tl.constexpr):
    """exp(sign x - max |x|), to float32's digits but for bfloat16 inputs: small features may be all that keys have."""
    y = x.to(tl.float32)
    y = y * sign - tl.max(tl.abs(y), AXIS, keep_dims=True)
    if x.dtype == tl.bfloat16:
        y = tl.exp2(y * LOG2E)
    else:
        y = tl.maximum(y, -150.0)
        whole = tl.floor(y * LOG2E + 0.5)
        rest = (y - whole * 0.693359375) + whole * 2.1219444005469057e-4  # less whole times log 2, in two parts
        y = tl.exp2(whole) * tl.exp2(rest * LOG2E)
    if FP != BF:
        y = tl.where(tl.expand_dims(tl.arange(0, BF) < FP, 1 - AXIS), y, 0.0)
    return y


@triton.jit
def exponential_log2(x):
    """Log2 of what ``exponential`` divides rows of pre-activations by."""
    return tl.max(tl.abs(x.to(tl.float32)), 1) * LOG2E


@triton.jit
def features(x, FP: tl.constexpr, BF: tl.constexpr, AXIS: tl.constexpr, MAP: tl.constexpr):
    """Both halves of the features of a tile; for finished features both are the tile."""
    return half_features(x, 1.0, FP, BF, AXIS, MAP), half_features(x, -1.0, FP, BF, AXIS, MAP)


@triton.jit
def features_backward(plus, minus, d_plus, d_minus, MAP: tl.constexpr):
    """Gradient of the pre-activations from that of both halves, features along axis 1."""
    if MAP == "exp":
        return plus * d_plus - minus * d_minus
    elif MAP == "softmax":
        d_plus = plus * (d_plus - tl.sum(plus * d_plus, 1, keep_dims=True))
        d_minus = minus * (d_minus - tl.sum(minus * d_minus, 1, keep_dims=True))
        return d_plus - d_minus
    else:
        return d_plus


@triton.jit
def load_gates(gates, slot, slots, head, row, HG: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr):
    """Running log2-decays of chunk rows: whole part and fraction, or (not SPLIT) all of it and nothing."""
    pointer = gates + (slot.to(tl.int64) * HG + head) * C + row
    whole = tl.load(pointer)
    return whole, tl.load(pointer + tl.cast(slots, tl.int64) * HG * C) if SPLIT else whole


@triton.jit
def load_key_gates(
    gates, slot, slots, head, row, HG: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, MAP: tl.constexpr
):  # fmt: skip
    """The same of keys, which differ from those of queries where features are exponential (see ``units.py``)."""
    if MAP == "exp":
        gates += 3 * tl.cast(slots, tl.int64) * HG * C
    return load_gates(gates, slot, slots, head, row, HG, C, SPLIT)


@triton.jit
def decay_between(whole, part, key_whole, key_part, SPLIT: tl.constexpr):
    """Log2 of the decay from key to query; SPLIT keeps the digits that a long sum has lost."""
    if SPLIT:
        return (whole - key_whole) + (part - key_part)
    else:
        return whole - key_whole


@triton.jit
def decay_since_start(whole, part, SPLIT: tl.constexpr):
    """The decay from the state that enters the chunk."""
    return tl.exp2(whole + part if SPLIT else whole)


@triton.jit
def load_ahead(gates, slot, slots, head, row, HG: tl.constexpr, C: tl.constexpr):
    """Sum of the gates between key row and query."""
    return tl.load(gates + ((2 * tl.cast(slots, tl.int64) + slot) * HG + head) * C + row)


@triton.jit
def in_window(own, c, valid, W: tl.constexpr):
    """[query, key]: c is one of the W rows up to the query's own, and at least ``valid``."""
    age = own[:, None] - tl.where(c >= valid, c, -(1 << 30))[None, :]
    return tl.cast(age, tl.uint32) < W
