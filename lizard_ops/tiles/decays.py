"""Decays in tiles, from running sums of log2-decays inside each chunk."""

from __future__ import annotations

import triton
import triton.language as tl

GATE_FLOOR = tl.constexpr(-200.0)  # log2 of a decay that is zero in float32; a chunk of them still sums exactly


@triton.jit
def load_gates(gates, slot, slots, head, row, HG: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr):
    """Running log2-decays of chunk rows: whole part and fraction, or (not SPLIT) all of it and nothing."""
    pointer = gates + (slot.to(tl.int64) * HG + head) * C + row
    whole = tl.load(pointer)
    return whole, tl.load(pointer + tl.cast(slots, tl.int64) * HG * C) if SPLIT else whole


@triton.jit
def load_key_gates(
    gates, slot, slots, head, row, HG: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, KEYED: tl.constexpr
):  # fmt: skip
    """The same of keys, which differ from those of queries if KEYED (see ``units.py``)."""
    if KEYED:
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
