"""Tensors [B, T, H, dim] of any strides: how kernels take them, address them and load tiles of them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

UNITS = {unit: tl.constexpr(unit) for unit in (1, 2, 4, 8)}  # made once: many tensors go through here in every launch


class Strided(NamedTuple):
    """A tensor [B, T, H, dim] of any strides but a unit last one.

    Strides are in steps of ``unit`` elements. Of an argument Triton knows only whether 16 divides it: without the unit,
    rows of 40 would be loaded number by number.
    """

    ptr: Tensor
    batch: int
    time: int
    head: int
    unit: tl.constexpr


def strided(x: Tensor) -> Strided:
    """The tensor as kernels take it; copied if its last stride is not one."""
    strides = x.stride()
    if strides[3] != 1 and x.shape[3] != 1:
        x = x.contiguous()
        strides = x.stride()
    return tuple.__new__(Strided, (x, *steps_of(*strides[:3])))  # a NamedTuple's own takes twice as long


@functools.lru_cache(maxsize=4096)
def steps_of(batch: int, time: int, head: int) -> tuple[int, int, int, tl.constexpr]:
    """These strides in units, and the unit."""
    unit = math.gcd(8, batch, time, head)
    return batch // unit, time // unit, head // unit, UNITS[unit]


def strided_heads(x: Tensor) -> Strided:
    """A tensor [B, T, H] as rows of one channel."""
    return Strided(x, *x.stride(), UNITS[1])


@triton.jit
def at(x, batch, row, head):
    """Address of channel 0 of one row of a ``Strided``."""
    steps = batch.to(tl.int64) * x.batch + row.to(tl.int64) * x.time + head.to(tl.int64) * x.head
    return x.ptr + steps * x.unit


@triton.jit
def time_step(x):
    """Elements from one row of a ``Strided`` to the next."""
    return x.time * x.unit


@triton.jit
def head_step(x):
    """Elements from one head of a ``Strided`` to the next."""
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


def rows_last(*tensors: Any) -> list[Any]:
    """The same tensors (or None), those whose last axis has strides copied."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
