"""What the window kernels share: blocks of rows in sequences of any length, masked loads, launch configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.tuning import tunable

FAR = tl.constexpr(1 << 30)  # beyond every row index


class Config(NamedTuple):
    """Launch configuration: rows and columns of a score tile, query heads in a tile of query rows, warps, stages,
    registers a thread (None: the compiler's choice)."""

    rows: int
    columns: int
    heads: int
    warps: int
    stages: int
    registers: int | None = None


class WindowCall(NamedTuple):
    """The tensors of a call of the window kernels, as ``window_forward`` describes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    anchor_k: Tensor | None
    anchor_v: Tensor | None
    sinks: Tensor | None
    first: Tensor | None
    cu_seqlens: Tensor | None
    lengths: Tensor | None = None  # [N] queries of right-padded rows, which the backward of keys alone asks for

    @property
    def anchor_rows(self) -> tuple[Tensor, Tensor]:
        """The anchors, or the stream whose first rows they are."""
        own = self.anchor_k is not None and self.anchor_v is not None
        return (self.anchor_k, self.anchor_v) if own else (self.k, self.v)

    @property
    def strides(self) -> list[int]:
        """What the kernels take of q, k, v and the anchors."""
        return strides(self.q, self.k, self.v, *self.anchor_rows)


class WindowNumbers(NamedTuple):
    """The numbers of such a call."""

    window: int
    anchors: int
    prefix: int
    scale: float
    softcap: float | None


@tunable("window")
def config_for(kernel: str, q: Tensor, v: Tensor, group: int) -> Config:
    """The configuration of a kernel ("forward", "queries" or "keys") by head dims and dtype, picked on an H200."""
    dim, full = max(q.shape[3], v.shape[3]), q.dtype == torch.float32
    if full:  # no tensor cores: a tile that is too large for the registers is spilled whole
        rows, columns, warps, stages = (16, 16, 8, 1) if dim > 128 else (16, 16, 4, 1) if dim > 64 else (32, 32, 4, 1)
    elif dim > 128:  # never 8 warps on 64 rows: docs/kernels.md
        rows, columns, warps, stages = (32, 32, 4, 1) if kernel == "keys" else (64, 32, 4, 1)
    else:
        rows, columns, warps, stages = (64, 32, 4, 2 if kernel != "keys" else 1 if dim > 64 else 3)
    if kernel == "keys":  # its tiles hold a power of two of heads
        return Config(rows, columns, min(triton.next_power_of_2(group), columns), warps, stages)
    few = kernel == "forward" and triton.next_power_of_2(group) == group  # other groups would spill: docs/kernels.md
    registers = None if full or dim > 128 else 128 if few else 168
    return Config(rows, columns, min(group, rows), warps, stages, registers)


@triton.jit
def locate_block(
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


def block_count(tokens: int, sequences: int, per_token: int, extra: int, block: int, packed: bool) -> int:
    """How many blocks ``locate_block`` knows; tokens a sequence, or in the packed row."""
    if packed:
        return (tokens * per_token + sequences * extra) // block + sequences
    return sequences * triton.cdiv(tokens * per_token + extra, block)


@triton.jit
def load_rows(p_rows, m_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] from row pointers [rows]; zero where masked and past DIM."""
    o_d = tl.arange(0, BLOCK)
    mask = m_rows[:, None]
    if DIM < BLOCK:
        mask = mask & (o_d < DIM)[None, :]
    return tl.load(p_rows[:, None] + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(p_rows, b_x, m_rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Store [rows, BLOCK] at row pointers [rows], not past DIM."""
    o_d = tl.arange(0, BLOCK)
    mask = m_rows[:, None]
    if DIM < BLOCK:
        mask = mask & (o_d < DIM)[None, :]
    tl.store(p_rows[:, None] + o_d[None, :], b_x.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def stream_bounds(first, i_n, A: tl.constexpr, P: tl.constexpr, CARRIED: tl.constexpr):
    """(stream row of position 0, or -A - 1 when that is far before the stream; first row open to the window)."""
    shift = tl.zeros([], tl.int32) + P
    if CARRIED:
        shift = tl.maximum(P - tl.load(first + i_n), -A - 1).to(tl.int32)
    return shift, tl.maximum(shift + A, 0)


def sequences_of(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def strides(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:3]]


def shape_arguments(x: WindowCall, numbers: WindowNumbers, config: Config) -> dict:
    """The compile-time arguments that every window kernel takes."""
    q, k, v = x.q, x.k, x.v
    dim, value = q.shape[3], v.shape[3]
    least = 16 if max(dim, value) <= 64 else 32  # 16 beside 128 is read out of bounds: docs/kernels.md
    return {
        "HK": k.shape[2], "G": q.shape[2] // k.shape[2], "D": dim, "V": value, "W": numbers.window,
        "A": numbers.anchors, "P": numbers.prefix, "BM": config.rows, "BN": config.columns,
        "BD": max(least, triton.next_power_of_2(dim)), "BV": max(least, triton.next_power_of_2(value)),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_warps": config.warps, "num_stages": config.stages, "maxnreg": config.registers,
    }  # fmt: skip


def rows_last(*tensors: Any) -> list[Any]:
    """The same tensors (or None), those whose last axis has strides copied."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
