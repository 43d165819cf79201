"""Running gates of exponential features, whose logs have no bound.

The features exp(+-x) of a row are divided by their largest; its log, log_j of key j, joins the decays. With G the
running log-decay of a chunk, a key weighs L_j = log_j - G_j seen from before the chunk. The unit of query i is the
largest weight that it sees: its log is G_i + N_i with N_i = max(M, L_j for j <= i), where M is the log scale of the
state that enters the chunk; the state that leaves has G_end + N_end. So no weight exceeds 1, and the kernels of
head-wise gates find what they look for, decays, in two running sums per chunk::

    of queries  M - N_i     the decay since the state that entered (at the end: of the state from chunk to chunk)
    of keys     M - L_j     with that of a query, the decay in between: (M - N_i) - (M - L_j) = L_j - N_i

Where no key came before, M is the L of the first key: any scale suits a state of nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.state import running_gates
from lizard_ops.tiles.decays import load_ahead
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import Stream, first_rows, first_slot, locate_chunk, sequence, slot_count
from lizard_ops.tiles.strided import at, strided, strided_heads, time_step

# Log2 of a decay that outweighs any feature of a float16; the sums of a chunk stay whole numbers in float32.
FLOOR = tl.constexpr(-1.0e5)
SCAN = 64  # chunks that the scan takes at once


@triton.jit
def larger(a, b):
    """What the running maxima combine by."""
    return tl.maximum(a, b)


@triton.jit
def key_weight_kernel(
    fk, g, decay, weight, chunk_decay, chunk_top, stream,
    ANCHORS: tl.constexpr, HS: tl.constexpr, HK: tl.constexpr, HG: tl.constexpr, FP: tl.constexpr, BF: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """G and L of a chunk's rows, -inf where there is no key; its whole decay and its largest L. Log2, float64."""
    slot, head = tl.program_id(0) // HS, tl.program_id(0) % HS
    n, i_chunk, batch, first, length = locate_chunk(slot, stream, C)
    seen = length - stream.shift
    _, linear_row, _, behind = first_rows(n, first, stream, ANCHORS)
    i = tl.arange(0, C)
    row = i_chunk * C
    b_decay = tl.zeros([C], tl.float64)
    if g is not None:
        p_g = at(g, batch, linear_row, head // (HS // HG)) + (row + i).to(tl.int64) * g.time
        b_g = tl.load(p_g, mask=row + i < seen, other=0.0)
        b_decay = tl.cumsum(tl.maximum(b_g.to(tl.float64) * LOG2E, FLOOR), 0)
    p_fk = at(fk, batch, linear_row, head // (HS // HK))
    top = tl.zeros([C], tl.float32)
    for f in tl.static_range(0, FP, BF):
        d = f + tl.arange(0, BF)
        mask = (row + i < seen)[:, None] & (d < FP)[None, :]
        b_fk = tl.load(p_fk + (row + i).to(tl.int64)[:, None] * time_step(fk) + d[None, :], mask=mask, other=0.0)
        top = tl.maximum(top, tl.max(tl.abs(b_fk.to(tl.float32)), 1))
    is_key = (row + i < seen) & (row + i + stream.start >= behind)
    b_weight = tl.where(is_key, top.to(tl.float64) * LOG2E - b_decay, float("-inf"))
    entry = slot.to(tl.int64) * HS + head
    tl.store(decay + entry * C + i, b_decay)
    tl.store(weight + entry * C + i, b_weight)
    tl.store(chunk_decay + entry, tl.sum(tl.where(i == C - 1, b_decay, 0.0), 0))
    tl.store(chunk_top + entry, tl.max(b_weight, 0))


@triton.jit
def unit_scan_kernel(
    chunk_decay, chunk_top, before, start, end, stream, HS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Log2 scale of the state that enters each chunk; start and end [N, Hs] are in natural units."""
    n, head = tl.program_id(0) // HS, tl.program_id(0) % HS
    _, first, length = sequence(n, stream)
    slot = first_slot(n, first, stream, C)
    chunks = tl.cdiv(tl.maximum(length - stream.shift, 0), C)
    scale = tl.full([], float("-inf"), tl.float64)
    if start is not None:
        scale = tl.load(start + n * HS + head).to(tl.float64) * LOG2E
    entry = slot.to(tl.int64) * HS + head
    tl.store(before + entry, scale, mask=chunks > 0)
    c = tl.arange(0, BLOCK)
    for i in range(0, chunks, BLOCK):
        p = entry + tl.cast(i, tl.int64) * HS + c * HS
        b_decay = tl.load(chunk_decay + p, mask=i + c < chunks, other=0.0)
        b_top = tl.load(chunk_top + p, mask=i + c < chunks, other=float("-inf"))
        decay = tl.cumsum(b_decay, 0)
        top = tl.associative_scan(b_top + b_decay - decay, 0, larger)  # weights seen from before the block
        after = decay + tl.maximum(top, scale)
        tl.store(before + p + HS, after, mask=i + c + 1 < chunks)
        scale = tl.sum(tl.where(c == BLOCK - 1, after, 0.0), 0)
    tl.store(end + n * HS + head, (scale / LOG2E).to(tl.float32))


@triton.jit
def unit_gate_kernel(
    decay, weight, before, ahead, gates, slots, HS: tl.constexpr, HG: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The running sums of queries and keys, as whole part and fraction, and the logs that a query's mass lacks."""
    slot, head = tl.program_id(0) // HS, tl.program_id(0) % HS
    entry = slot.to(tl.int64) * HS + head
    i = tl.arange(0, C)
    b_decay = tl.load(decay + entry * C + i)
    b_weight = tl.load(weight + entry * C + i)
    is_key = b_weight > float("-inf")
    scale = tl.load(before + entry)
    first = tl.min(tl.where(is_key, i, C), 0)
    scale = tl.where(scale > float("-inf"), scale, tl.sum(tl.where(is_key & (i == first), b_weight, 0.0), 0))
    unit = tl.maximum(tl.associative_scan(b_weight, 0, larger), scale)
    step = tl.cast(slots, tl.int64) * HS * C
    out = gates + entry * C + i
    store_parts(out, step, scale - unit)
    store_parts(out + 3 * step, step, tl.where(is_key, scale - b_weight, float("inf")))
    more = (b_decay + unit).to(tl.float32)
    if ahead is not None:
        more += load_ahead(ahead, slot, slots, head // (HS // HG), i, HG, C)
    tl.store(out + 2 * step, more)


@triton.jit
def store_parts(pointer, step, x):
    """A float64 number as a whole one and the rest, float32 both."""
    whole = tl.floor(x + 0.5).to(tl.float32)
    tl.store(pointer, whole)
    tl.store(pointer + step, tl.where(x == float("inf"), 0.0, x - whole.to(tl.float64)).to(tl.float32))


def unit_gates(
    fk: Tensor, g: Tensor | None, log_scale: Tensor | None, stream: Stream, shape: FusedShape
) -> tuple[Tensor, Tensor]:
    """([5, slots, Hs, C] float32 for ``load_gates`` and ``load_key_gates``, log scale [N, Hs] after the last chunk)."""
    slots, heads, chunk = slot_count(stream, shape.chunk), shape.state_heads, shape.chunk
    gates = torch.empty(5, slots, heads, chunk, dtype=torch.float32, device=fk.device)
    end = torch.empty(stream.ends - 1, heads, dtype=torch.float32, device=fk.device)
    decay, weight = (fk.new_empty(slots, heads, chunk, dtype=torch.float64) for _ in range(2))
    chunk_decay, chunk_top, before = (fk.new_empty(slots, heads, dtype=torch.float64) for _ in range(3))
    start = None if log_scale is None else log_scale.float().contiguous()
    gate_heads = 1 if g is None else g.shape[2]
    ahead = running_gates(g, stream, shape) if shape.outside and g is not None else None
    if slots:
        launch_kernel(
            key_weight_kernel, slots * heads,
            strided(fk), None if g is None else strided_heads(g), decay, weight, chunk_decay, chunk_top, stream,
            shape.anchors, heads, shape.key_heads, gate_heads, shape.pre, min(64, shape.pre_block), chunk, num_warps=4,
        )  # fmt: skip
    launch_kernel(
        unit_scan_kernel, (stream.ends - 1) * heads,
        chunk_decay, chunk_top, before, start, end, stream, heads, chunk, SCAN, num_warps=2,
    )  # fmt: skip
    if slots:
        launch_kernel(
            unit_gate_kernel, slots * heads,
            decay, weight, before, ahead, gates, slots, heads, gate_heads, chunk, num_warps=4,
        )  # fmt: skip
    return gates, end
