"""Where sequences stand, and how programs are spread over them: equal rows of a batch, right-padded or packed ones."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.sizes import cdiv

FAR = tl.constexpr(1 << 30)  # beyond every row index


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


def block_count(tokens: int, sequences: int, extra: int, block: int, packed: bool, per_token: int = 1) -> int:
    """Programs over sequences of L tokens with L * per_token + extra rows each, ``block`` rows per program.

    tokens: of each sequence, or in the packed row. Packed, the blocks of sequence n start at (rows before it) // block
    + n: every sequence gets enough, some one too many, and nothing has to be counted on the host.
    """
    if packed:
        return (tokens * per_token + sequences * extra) // block + sequences
    return sequences * max(0, cdiv(tokens * per_token + extra, block))


def stream_blocks(stream: Stream, extra: int, block: int) -> int:
    """Programs that ``locate_in_stream`` spreads over all sequences, each of its length + extra rows."""
    return block_count(stream.length, stream.ends - 1, extra, block, stream.cu_seqlens is not None)


def head_lead(offset: int, block: int) -> int:
    """Rows to put before row 0 so that row ``offset`` starts a block."""
    return -offset % block


def slot_count(stream: Stream, chunk: int) -> int:
    """Chunks over all sequences."""
    return stream_blocks(stream, -stream.shift if stream.cu_seqlens is None else 0, chunk)


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
def locate_in_stream(pid, stream, EXTRA, BLOCK: tl.constexpr):
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
    """``locate_in_stream`` for chunks of the linear rows that some query sees."""
    if stream.cu_seqlens is not None:
        return locate_in_stream(slot, stream, 0, C)
    else:
        return locate_in_stream(slot, stream, -stream.shift, C)


@triton.jit
def first_slot(n, first, stream, C: tl.constexpr):
    """Slot of the first chunk of a sequence in the buffers that hold one entry per chunk."""
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
def locate_in_rows(
    i_block, cu_seqlens, T, N, STEPS, PER_TOKEN: tl.constexpr, EXTRA: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """(sequence, block in it, first token in the packed row, tokens) of a row block.

    A sequence of L tokens has L * PER_TOKEN + EXTRA rows. When packed, the blocks of sequence n start at
    (rows before it) // BLOCK + n: every sequence gets enough, some get one too many, and no count is needed.
    """
    if PACKED:
        low = i_block * 0
        high = low + N
        for _ in range(STEPS):
            middle = (low + high) // 2
            rows = tl.load(cu_seqlens + middle).to(tl.int64) * PER_TOKEN + middle * EXTRA
            before = rows // BLOCK + middle <= i_block
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        i_n = low
        bos = tl.load(cu_seqlens + i_n).to(tl.int64)
        length = (tl.load(cu_seqlens + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        i_block = i_block - ((bos * PER_TOKEN + i_n * EXTRA) // BLOCK + i_n).to(tl.int32)
    else:
        blocks = tl.cdiv(T * PER_TOKEN + EXTRA, BLOCK)
        i_n = i_block // blocks
        i_block = i_block % blocks
        bos = (i_block * 0).to(tl.int64)
        length = T
    return i_n, i_block, bos, length


@triton.jit
def stream_bounds(first, i_n, A: tl.constexpr, P: tl.constexpr, CARRIED: tl.constexpr):
    """(stream row of position 0, or -A - 1 when that is far before the stream; first row open to the window)."""
    shift = tl.zeros([], tl.int32) + P
    if CARRIED:
        shift = tl.maximum(P - tl.load(first + i_n), -A - 1).to(tl.int32)
    return shift, tl.maximum(shift + A, 0)
