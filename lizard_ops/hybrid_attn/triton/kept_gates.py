"""Gates of keys that enter the sums where they expire, for any feature map: running sums of units (``units.py``).

Row r of the linear branch has the key j that expires there. With S the running log-decay of its sequence it enters with
the weight exp(S_r - S_j), which may be any size, so weights are kept as those of exponential features are: beside their
largest. A reset between j and r leaves nothing of the key. A query has linear keys at all if one of those that have
expired so far stands at or behind the last reset; that it does not is told by a log mass of -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.triton.bwd_linear import KeyTerms
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.kept_index import Index
from lizard_ops.hybrid_attn.triton.units import FLOOR, SCAN, larger, unit_gate_kernel, unit_scan_kernel
from lizard_ops.tiles.launcher import launch_kernel
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import FAR, Stream, first_slot, locate_chunk, sequence, slot_count
from lizard_ops.tiles.strided import at, strided, strided_heads, time_step


class KeptShape(FusedShape):
    """A call whose linear rows are keys in the order in which they expire."""

    @property
    def keyed(self) -> bool:
        return True


@triton.jit
def chunk_decay_kernel(
    g, source, decay, chunk_decay, chunk_reset, chunk_newest, tokens, stream,
    HS: tl.constexpr, HK: tl.constexpr, HG: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Of a chunk: its running log2-decay, the whole of it, its last reset and the newest key that expires in it."""
    slot, head = tl.program_id(0) // HS, tl.program_id(0) % HS
    _, i_chunk, batch, first, length = locate_chunk(slot, stream, C)
    r = i_chunk * C + tl.arange(0, C)
    b_decay, b_reset = row_decays(g, batch, first, head // (HS // HG), r, length)
    p_source = source + (batch.to(tl.int64) * HK + head // (HS // HK)) * tokens + first
    newest = tl.load(p_source + r, mask=r < length, other=-1) - stream.prefix  # below 0: of before the first query
    b_decay = tl.cumsum(b_decay, 0)
    entry = slot.to(tl.int64) * HS + head
    tl.store(decay + entry * C + tl.arange(0, C), b_decay)
    tl.store(chunk_decay + entry, tl.sum(tl.where(tl.arange(0, C) == C - 1, b_decay, 0.0), 0))
    tl.store(chunk_reset + entry, tl.max(b_reset, 0))
    tl.store(chunk_newest + entry, tl.maximum(tl.max(newest, 0), -1))


@triton.jit
def row_decays(g, batch, first, head, r, length):
    """(log2-decay of each row, the row itself where that is a reset, else -1)."""
    b_g = tl.zeros(r.shape, tl.float32)
    if g is not None:
        b_g = tl.load(at(g, batch, first, head) + r.to(tl.int64) * g.time, mask=r < length, other=0.0)
    return tl.maximum(b_g.to(tl.float64) * LOG2E, FLOOR), tl.where(b_g == float("-inf"), r, -1)


@triton.jit
def decay_scan_kernel(
    chunk_decay, chunk_reset, chunk_newest, decay_before, reset_before, newest_before, stream,
    HS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Before each chunk of a sequence: all decay, the last reset and the newest key that has expired."""
    n, head = tl.program_id(0) // HS, tl.program_id(0) % HS
    _, first, length = sequence(n, stream)
    entry = first_slot(n, first, stream, C).to(tl.int64) * HS + head
    chunks = tl.cdiv(length, C)
    decay, reset, newest = tl.zeros([], tl.float64), n * 0 - 1, n * 0 - 1
    c = tl.arange(0, BLOCK)
    for i in range(0, chunks, BLOCK):
        p = entry + tl.cast(i, tl.int64) * HS + c * HS
        there, last = i + c < chunks, c == BLOCK - 1
        b_decay = tl.load(chunk_decay + p, mask=there, other=0.0)
        b_reset = tl.load(chunk_reset + p, mask=there, other=-1)
        b_newest = tl.load(chunk_newest + p, mask=there, other=-1)
        after = decay + tl.cumsum(b_decay, 0)
        reset_after = tl.maximum(tl.associative_scan(b_reset, 0, larger), reset)
        newest_after = tl.maximum(tl.associative_scan(b_newest, 0, larger), newest)
        tl.store(decay_before + p, decay, mask=there & (c == 0))
        tl.store(reset_before + p, reset, mask=there & (c == 0))
        tl.store(newest_before + p, newest, mask=there & (c == 0))
        within = (i + c + 1 < chunks) & (c + 1 < BLOCK)
        tl.store(decay_before + p + HS, after, mask=within)
        tl.store(reset_before + p + HS, reset_after, mask=within)
        tl.store(newest_before + p + HS, newest_after, mask=within)
        decay = tl.sum(tl.where(last, after, 0.0), 0)
        reset = tl.max(tl.where(last, reset_after, -1), 0)
        newest = tl.max(tl.where(last, newest_after, -1), 0)


@triton.jit
def entering_weight_kernel(
    fk, g, source, past, decay, decay_before, reset_before, newest_before, weight, chunk_top, gates, slots, tokens,
    stream, HS: tl.constexpr, HK: tl.constexpr, HG: tl.constexpr, FP: tl.constexpr, BF: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """L of a chunk's rows, -inf where no key enters, and its largest; whether each query has linear keys, as log mass.

    fk: the rows of the keys that enter, of which exponential features have a log. past [B, Hs, prefix]: log-decays from
    keys of before the first query up to it.
    """
    slot, head = tl.program_id(0) // HS, tl.program_id(0) % HS
    n, i_chunk, batch, first, length = locate_chunk(slot, stream, C)
    i = tl.arange(0, C)
    r = i_chunk * C + i
    entry, slot_zero = slot.to(tl.int64) * HS + head, first_slot(n, first, stream, C)
    _, b_reset = row_decays(g, batch, first, head // (HS // HG), r, length)
    p_source = source + (batch.to(tl.int64) * HK + head // (HS // HK)) * tokens + first
    row = tl.load(p_source + r, mask=r < length, other=-1)
    key = row - stream.prefix
    reset = tl.maximum(tl.associative_scan(b_reset, 0, larger), tl.load(reset_before + entry))
    newest = tl.maximum(tl.associative_scan(key, 0, larger), tl.load(newest_before + entry))
    left = tl.where(newest >= reset, 0.0, float("-inf"))
    tl.store(gates + (2 * tl.cast(slots, tl.int64) * HS + entry) * C + i, left)
    is_key = (row >= 0) & (tl.maximum(key, -1) >= reset)
    of_past, is_new = is_key & (key < 0), is_key & (key >= 0)
    of_key = (slot_zero + key // C).to(tl.int64) * HS + head
    since = tl.load(decay_before + of_key, mask=is_new, other=0.0)
    since += tl.load(decay + of_key * C + key % C, mask=is_new, other=0.0)
    if past is not None:
        p_past = past + (batch.to(tl.int64) * HS + head) * stream.prefix
        b_past = tl.load(p_past + row, mask=of_past, other=0.0) * LOG2E
        is_key = is_key & (b_past > float("-inf"))
        since -= tl.maximum(b_past, FLOOR)
    log = tl.load(decay_before + entry) - since  # the decay since the key less that in the chunk
    if MAP == "exp":
        p_fk = at(fk, batch, first, head // (HS // HK)) + r.to(tl.int64)[:, None] * time_step(fk)
        top = tl.zeros([C], tl.float32)
        for f in tl.static_range(0, FP, BF):
            d = f + tl.arange(0, BF)
            b_fk = tl.load(p_fk + d[None, :], mask=(r < length)[:, None] & (d < FP)[None, :], other=0.0)
            top = tl.maximum(top, tl.max(tl.abs(b_fk.to(tl.float32)), 1))
        log += top.to(tl.float64) * LOG2E
    log = tl.where(is_key, log, float("-inf"))
    tl.store(weight + entry * C + i, log)
    tl.store(chunk_top + entry, tl.max(log, 0))


def entering_gates(
    fk: Tensor, g: Tensor | None, index: Index, stream: Stream, shape: FusedShape, past: Tensor | None = None,
    log_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """([5, slots, Hs, C] float32 for ``load_gates`` and ``load_key_gates``, log scale [N, Hs] after the last chunk).

    fk as it enters. past [B, Hs, prefix] float64: log-decays of a carried state's keys up to the first query; its sums
    have this log_scale [N, Hs].
    """
    slots, heads, chunk = slot_count(stream, shape.chunk), shape.state_heads, shape.chunk
    tokens, gate_heads = fk.shape[1], 1 if g is None else g.shape[2]
    gates = torch.empty(5, slots, heads, chunk, dtype=torch.float32, device=fk.device)
    decay, weight = (fk.new_empty(slots, heads, chunk, dtype=torch.float64) for _ in range(2))
    chunk_decay, decay_before, chunk_top, before = (fk.new_empty(slots, heads, dtype=torch.float64) for _ in range(4))
    whole = [fk.new_empty(slots, heads, dtype=torch.int32) for _ in range(4)]
    end = torch.empty(stream.ends - 1, heads, dtype=torch.float32, device=fk.device)
    start = None if log_scale is None else log_scale.float().contiguous()
    if not slots:
        return gates, end.fill_(-torch.inf) if start is None else end.copy_(start)
    rows, sequences = None if g is None else strided_heads(g), (stream.ends - 1) * heads
    chunk_reset, chunk_newest, reset_before, newest_before = whole
    launch_kernel(
        chunk_decay_kernel, slots * heads,
        rows, index.source, decay, chunk_decay, chunk_reset, chunk_newest, tokens, stream, heads, shape.key_heads,
        gate_heads, chunk, num_warps=4,
    )  # fmt: skip
    launch_kernel(
        decay_scan_kernel, sequences,
        chunk_decay, chunk_reset, chunk_newest, decay_before, reset_before, newest_before, stream, heads, chunk, SCAN,
        num_warps=2,
    )  # fmt: skip
    launch_kernel(
        entering_weight_kernel, slots * heads,
        strided(fk), rows, index.source, past, decay, decay_before, reset_before, newest_before, weight, chunk_top,
        gates, slots, tokens, stream, heads, shape.key_heads, gate_heads, shape.pre, min(64, shape.pre_block), chunk,
        shape.feature_map, num_warps=4,
    )  # fmt: skip
    launch_kernel(
        unit_scan_kernel, sequences, chunk_decay, chunk_top, before, start, end, stream, heads, chunk, SCAN, num_warps=2
    )  # fmt: skip
    launch_kernel(
        unit_gate_kernel, slots * heads, decay, weight, before, gates, gates, slots, heads, heads, chunk, num_warps=4,
    )  # fmt: skip
    return gates, end


@triton.jit
def received(near, far, ends, batch, head, first, length, r, slot_zero, tokens, stream, HS: tl.constexpr,
             HK: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """What the key of each row receives of all queries, less what row r's own does once it has expired; float64."""
    here = ((slot_zero + r // C).to(tl.int64) * HS + head) * C + r % C
    b_sum = tl.load(near + here, mask=r < length, other=0.0) + tl.load(far + here, mask=r < length, other=0.0)
    row = r + stream.prefix
    b_own = received_late(near, far, ends, batch, head, first, length, row, slot_zero, tokens, stream, HS, HK, C)
    return b_sum.to(tl.float64) - b_own.to(tl.float64)


@triton.jit
def received_late(near, far, ends, batch, head, first, length, row, slot_zero, tokens, stream, HS: tl.constexpr,
                  HK: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """What these rows of keys receive of all queries once they have entered the sums."""
    rows = length + stream.prefix
    p_ends = ends + (batch.to(tl.int64) * HK + head // (HS // HK)) * (tokens + stream.prefix) + first
    end = tl.load(p_ends + row, mask=row < rows, other=0)
    inside = (end > 0) & (end < rows)
    end = tl.where(inside, end - stream.prefix, 0)
    there = ((slot_zero + end // C).to(tl.int64) * HS + head) * C + end % C
    return tl.load(near + there, mask=inside, other=0.0) + tl.load(far + there, mask=inside, other=0.0)


@triton.jit
def held_sum_kernel(
    near, far, ends, sums, tokens, stream, HS: tl.constexpr, HK: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """The sum of a chunk's ``received``."""
    slot, head = tl.program_id(0) // HS, tl.program_id(0) % HS
    n, i_chunk, batch, first, length = locate_chunk(slot, stream, C)
    r = i_chunk * C + tl.arange(0, C)
    slot_zero = first_slot(n, first, stream, C)
    b_diff = received(near, far, ends, batch, head, first, length, r, slot_zero, tokens, stream, HS, HK, C)
    tl.store(sums + slot.to(tl.int64) * HS + head, tl.sum(b_diff, 0))


@triton.jit
def held_kernel(
    near, far, ends, sums, dg, tokens, stream, HS: tl.constexpr, HK: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gate l scales what key j receives once it has expired at r, for j < l <= r: sums from l on of ``received``."""
    slot, head = tl.program_id(0) // HS, tl.program_id(0) % HS
    n, i_chunk, batch, first, length = locate_chunk(slot, stream, C)
    r = i_chunk * C + tl.arange(0, C)
    slot_zero = first_slot(n, first, stream, C)
    b_diff = received(near, far, ends, batch, head, first, length, r, slot_zero, tokens, stream, HS, HK, C)
    chunks = tl.cdiv(length, C)
    later = tl.zeros([BLOCK], tl.float64)
    for i in range(i_chunk + 1, chunks, BLOCK):
        c = i + tl.arange(0, BLOCK)
        later += tl.load(sums + (slot_zero + c).to(tl.int64) * HS + head, mask=c < chunks, other=0.0)
    b_dg = tl.cumsum(b_diff, 0, reverse=True) + tl.sum(later, 0)
    p_dg = at(dg, batch, first, head) + r.to(tl.int64) * dg.time
    tl.store(p_dg, b_dg.to(tl.float32), mask=r < length)


def held_gradients(g: Tensor, keys: KeyTerms, index: Index, stream: Stream, shape: FusedShape) -> Tensor:
    """What g gets for the decays of keys until they expire, float32."""
    heads, slots = shape.state_heads, slot_count(stream, shape.chunk)
    dg = torch.empty(*g.shape[:2], heads, dtype=torch.float32, device=g.device)
    sums = torch.empty(slots, heads, dtype=torch.float64, device=g.device)
    if slots:
        given = keys.near, keys.far, index.entries, sums
        launch_kernel(
            held_sum_kernel, slots * heads,
            *given, g.shape[1], stream, heads, shape.key_heads, shape.chunk, num_warps=4,
        )  # fmt: skip
        launch_kernel(
            held_kernel, slots * heads,
            *given, strided_heads(dg), g.shape[1], stream, heads, shape.key_heads, shape.chunk, 128, num_warps=4,
        )  # fmt: skip
    gate_heads = g.shape[2]
    return dg.unflatten(2, (gate_heads, heads // gate_heads)).sum(-1) if gate_heads != heads else dg


@triton.jit
def past_kernel(
    near, far, ends, d_past, tokens, stream, HS: tl.constexpr, HK: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The log-decay of a carried key up to the first query scales what the key receives once it has expired."""
    blocks = tl.cdiv(stream.prefix, BLOCK)
    n, head, block = tl.program_id(0) // (blocks * HS), tl.program_id(0) // blocks % HS, tl.program_id(0) % blocks
    batch, first, length = sequence(n, stream)
    row = block * BLOCK + tl.arange(0, BLOCK)
    slot_zero = first_slot(n, first, stream, C)
    seen = tl.where(row < stream.prefix, row, FAR)
    b_sum = received_late(near, far, ends, batch, head, first, length, seen, slot_zero, tokens, stream, HS, HK, C)
    p_past = d_past + (batch.to(tl.int64) * HS + head) * stream.prefix
    tl.store(p_past + row, b_sum.to(tl.float64), mask=row < stream.prefix)


def past_gradients(keys: KeyTerms, index: Index, stream: Stream, shape: FusedShape) -> Tensor:
    """Gradient of the log-decays [B, Hs, prefix] of the keys of a carried state, float64."""
    batch, _, rows = index.ends.shape
    d_past = torch.zeros(batch, shape.state_heads, stream.prefix, dtype=torch.float64, device=index.ends.device)
    if rows > stream.prefix:
        blocks = batch * shape.state_heads * triton.cdiv(stream.prefix, 128)
        launch_kernel(
            past_kernel, blocks,
            keys.near, keys.far, index.entries, d_past, rows - stream.prefix, stream, shape.state_heads,
            shape.key_heads, shape.chunk, 128, num_warps=4,
        )  # fmt: skip
    return d_past
