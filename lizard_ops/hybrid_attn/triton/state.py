"""Running gates and chunk states: what the row kernels need from the past, and its gradient from the future."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.sizes import cdiv
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.tiles.decays import GATE_FLOOR, decay_between, decay_since_start, load_gates, load_key_gates
from lizard_ops.tiles.features import half_features
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import Stream, first_rows, first_slot, locate_chunk, sequence, slot_count
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned
from lizard_ops.tiles.strided import at, load_tile, load_tile_transposed, strided, strided_heads, time_step
from lizard_ops.tiles.widths import power_of_two


class States(NamedTuple):
    """One entry per chunk ("slot"): what enters it, or for gradients what leaves it."""

    s: Tensor  # [slots, Hs, F, V]
    z: Tensor  # [slots, Hs, F] float32
    phi: Tensor | None  # features of the linear rows, like fk with F
    end_s: Tensor | None  # [N, Hs, F, V] float32, after the last chunk, or for gradients before the first
    end_z: Tensor | None  # [N, Hs, F] float32


@triton.jit
def finite(g):
    """Log-decays for sums whose differences keep float32's digits; below the floor a decay is zero whatever it is."""
    return tl.maximum(g, -1.0e6).to(tl.float64)


@triton.jit
def is_reset(g):
    """1 where a gate forgets everything, a log-decay of -inf."""
    return (g == float("-inf")).to(tl.int32)


@triton.jit
def gate_kernel(
    g, gates, slots, stream, WINDOW: tl.constexpr, BW: tl.constexpr, HG: tl.constexpr, C: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Running sums of log2-decays inside each chunk, and the sum over the gates between each row and its query."""
    slot, head = tl.program_id(0) // HG, tl.program_id(0) % HG
    n, i_chunk, batch, first, length = locate_chunk(slot, stream, C)
    _, linear_row, _, _ = first_rows(n, first, stream, 0)
    seen = length - stream.shift  # linear rows that some query sees
    known = length + stream.prefix - stream.start
    i = tl.arange(0, C)
    pointer = at(g, batch, linear_row, head)
    r = i_chunk * C + i
    b_g = tl.load(pointer + r.to(tl.int64) * g.time, mask=r < seen, other=0.0) * LOG2E
    b_g = tl.maximum(b_g, GATE_FLOOR)
    out = gates + (slot.to(tl.int64) * HG + head) * C + i
    step = tl.cast(slots, tl.int64) * HG * C
    if SPLIT:
        whole = tl.floor(b_g + 0.5)
        tl.store(out + step, tl.cumsum(b_g - whole, 0))
        b_g = whole
    tl.store(out, tl.cumsum(b_g, 0))
    if (
        WINDOW > 0
    ):  # sum over r < l <= r + WINDOW: the first WINDOW gates, and those that come in less those that go out
        start = tl.arange(0, BW)
        p_start = pointer + (i_chunk * C + start).to(tl.int64) * g.time
        b_start = tl.load(p_start, mask=(start < WINDOW) & (i_chunk * C + start < known), other=0.0)
        b_out = tl.load(pointer + r.to(tl.int64) * g.time, mask=r < known, other=0.0)
        b_in = tl.load(pointer + (r + WINDOW).to(tl.int64) * g.time, mask=r + WINDOW < known, other=0.0)
        ahead = tl.sum(finite(b_start), 0) + tl.cumsum(finite(b_in) - finite(b_out), 0)
        resets = tl.sum(is_reset(b_start), 0) + tl.cumsum(is_reset(b_in) - is_reset(b_out), 0)
        tl.store(out + 2 * step, tl.where(resets > 0, float("-inf"), ahead.to(tl.float32) * LOG2E))
    else:
        tl.store(out + 2 * step, tl.zeros([C], tl.float32))


@triton.jit
def chunk_state_kernel(
    fk, v, phi, gates, s, z, slots, stream,
    ANCHORS: tl.constexpr, HS: tl.constexpr, HK: tl.constexpr, HG: tl.constexpr, FP: tl.constexpr, BF: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BJ: tl.constexpr, MAP: tl.constexpr, SPLIT: tl.constexpr,
    KEYED: tl.constexpr, LINEAR_DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to one half of the state: sum_j exp(G_end - G_j) phi_k(k_j) [v_j, 1]; and phi_k itself."""
    HALVES: tl.constexpr = 2 if MAP != "identity" else 1
    half, entry = tl.program_id(0) % HALVES, tl.program_id(0) // HALVES
    slot, head = entry // HS, entry % HS
    n, i_chunk, batch, first, length = locate_chunk(slot, stream, C)
    seen = length - stream.shift
    key_row, linear_row, _, behind = first_rows(n, first, stream, ANCHORS)
    head_k, head_g = head // (HS // HK), head // (HS // HG)
    p_fk = at(fk, batch, linear_row, head_k)
    p_v = at(v, batch, key_row + stream.start, head_k)
    end_whole, end_part = load_gates(gates, slot, slots, head_g, C - 1, HG, C, SPLIT)
    b_s = tl.zeros([BF, BV], tl.float32)
    b_z = tl.zeros([BF], tl.float32)
    for j in tl.range(0, C, BJ, num_stages=STAGES):
        row = i_chunk * C + j
        r = row + tl.arange(0, BJ)
        b_fk = load_tile_transposed(p_fk, time_step(fk), row, seen, BJ, FP, BF)  # [BF, BJ]
        b_v = load_tile(p_v, time_step(v), row, seen, BJ, V, BV).to(LINEAR_DTYPE)  # [BJ, BV]
        whole, part = load_key_gates(gates, slot, slots, head_g, j + tl.arange(0, BJ), HG, C, SPLIT, KEYED)
        decay = tl.exp2(decay_between(end_whole, end_part, whole, part, SPLIT))
        decay = tl.where((r < seen) & (r + stream.start >= behind), decay, 0.0)
        b_phi = half_features(b_fk, 1.0 - 2.0 * half, FP, BF, 0, MAP)
        if MAP != "identity" and (HS == HK or head % (HS // HK) == 0):
            f = tl.arange(0, BF)
            p_phi = at(phi, batch, linear_row + row, head_k) + half * FP + f[:, None]
            p_phi += (tl.arange(0, BJ) * time_step(phi))[None, :]
            tl.store(p_phi, b_phi.to(phi.ptr.dtype.element_ty), mask=(f < FP)[:, None] & (r < seen)[None, :])
        b_phi *= decay[None, :]
        b_s = tl.dot(b_phi.to(LINEAR_DTYPE), b_v, b_s, input_precision=PRECISION)
        b_z += tl.sum(b_phi, 1)
    store_state(s, z, entry, half, b_s, b_z, FP, BF, V, BV, HALVES)


@triton.jit
def store_state(
    s, z, entry, half, b_s, b_z, FP: tl.constexpr, BF: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Write one half of one chunk's sums."""
    f, d = half * FP + tl.arange(0, BF), tl.arange(0, BV)
    mask = tl.arange(0, BF) < FP
    base = entry.to(tl.int64) * (HALVES * FP)
    p_s = s + base * V + f[:, None] * V + d[None, :]
    tl.store(p_s, b_s.to(s.dtype.element_ty), mask=mask[:, None] & (d < V)[None, :])
    tl.store(z + base + f, b_z, mask=mask)


@triton.jit
def scan_tile(
    x, start, end, gates, slot, slots, chunks, n, head, head_g, tile,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, C: tl.constexpr,
    SPLIT: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Replace the addition of each chunk by the decayed sum of those before it (after it, if reversed)."""
    e = tile * BLOCK + tl.arange(0, BLOCK)
    mask = e < SIZE
    fixed = (n.to(tl.int64) * HS + head) * SIZE + e
    carry = tl.zeros([BLOCK], tl.float32)
    if HAS_START:
        carry = tl.load(start + fixed, mask=mask, other=0.0)
    for i in tl.range(0, chunks, num_stages=STAGES):
        i_slot = slot + (chunks - 1 - i if REVERSE else i)
        p_x = x + (i_slot.to(tl.int64) * HS + head) * SIZE + e
        b_x = tl.load(p_x, mask=mask, other=0.0)
        whole, part = load_gates(gates, i_slot, slots, head_g, C - 1, HG, C, SPLIT)
        decay = decay_since_start(whole, part, SPLIT)
        tl.store(p_x, carry.to(x.dtype.element_ty), mask=mask)
        carry = carry * decay + b_x
    if HAS_END:
        tl.store(end + fixed, carry, mask=mask)


@triton.jit
def scan_kernel(
    s, z, start_s, start_z, end_s, end_z, gates, slots, stream,
    HS: tl.constexpr, HG: tl.constexpr, F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scan over the chunks of a sequence, every element of s and z on its own."""
    TILES: tl.constexpr = (F * V + BLOCK - 1) // BLOCK
    Z_TILES: tl.constexpr = (F + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    tile = pid % (TILES + Z_TILES)
    n, head = pid // (TILES + Z_TILES) // HS, pid // (TILES + Z_TILES) % HS
    _, first, length = sequence(n, stream)
    slot = first_slot(n, first, stream, C)
    chunks = tl.cdiv(tl.maximum(length - stream.shift, 0), C)
    head_g = head // (HS // HG)
    if tile < TILES:
        scan_tile(
            s, start_s, end_s, gates, slot, slots, chunks, n, head, head_g, tile,
            F * V, BLOCK, HS, HG, C, SPLIT, REVERSE, HAS_START, HAS_END, STAGES,
        )  # fmt: skip
    else:
        scan_tile(
            z, start_z, end_z, gates, slot, slots, chunks, n, head, head_g, tile - TILES,
            F, BLOCK, HS, HG, C, SPLIT, REVERSE, HAS_START, HAS_END, STAGES,
        )  # fmt: skip


def running_gates(g: Tensor | None, stream: Stream, shape: FusedShape, plan: Plan | None = None) -> Tensor:
    """[3, slots, Hg, C] float32 for ``load_gates``. plan: of the call, where it is of a known kind."""
    slots = slot_count(stream, shape.chunk)
    if g is None:
        return torch.zeros(3, slots, 1, shape.chunk, dtype=torch.float32, device=shape.device)
    gates = g.new_empty(3, slots, g.shape[2], shape.chunk, dtype=torch.float32)

    def arguments() -> Arguments:
        window, heads = shape.window if shape.outside else 0, g.shape[2]
        args = (
            strided_heads(g), gates, slots, stream, window, power_of_two(window), heads, shape.chunk, shape.split,
        )  # fmt: skip
        return slots * heads, args, {"num_warps": 4}

    if slots:
        launch_planned(plan, "gates", gate_kernel, (g, gates), arguments)
    return gates


def chunk_states(
    fk: Tensor,
    v: Tensor,
    gates: Tensor,
    start: tuple[Tensor, Tensor] | None,
    stream: Stream,
    shape: FusedShape,
    end: bool,
    plan: Plan | None = None,
) -> States:
    """The state that enters each chunk, and with ``end`` the one after the last. plan: as for ``running_gates``."""
    phi = fk
    if shape.halves == 2:
        phi = fk.new_empty(*fk.shape[:3], shape.features, dtype=shape.state_dtype)
    states = empty_states(gates, stream, shape, end)._replace(phi=phi)
    slots = gates.shape[1]

    def arguments() -> Arguments:
        c = shape.config("state")
        args = (
            strided(fk), strided(v), strided(phi), gates, states.s, states.z, slots, stream, shape.anchors,
            shape.state_heads, shape.key_heads, gates.shape[2], shape.pre, shape.pre_block, shape.value,
            shape.value_block, shape.chunk, c.rows, shape.feature_map, shape.split, shape.keyed, shape.linear_dtype,
            shape.precision, c.stages,
        )  # fmt: skip
        return slots * shape.state_heads * shape.halves, args, c.launch

    if slots:
        tensors = (fk, v, phi, gates, states.s, states.z)
        launch_planned(plan, "states", chunk_state_kernel, tensors, arguments)
    scan_states(states, start, gates, stream, shape, reverse=False, plan=plan)
    return states


def empty_states(gates: Tensor, stream: Stream, shape: FusedShape, end: bool) -> States:
    """Buffers for one entry per chunk."""
    heads = (shape.state_heads, shape.features)
    s = gates.new_empty(gates.shape[1], *heads, shape.value, dtype=shape.state_dtype)
    z = gates.new_empty(gates.shape[1], *heads, dtype=torch.float32)
    if not end:
        return States(s, z, None, None, None)
    end_s = gates.new_empty(stream.ends - 1, *heads, shape.value, dtype=torch.float32)
    return States(s, z, None, end_s, gates.new_empty(stream.ends - 1, *heads, dtype=torch.float32))


def scan_states(
    states: States,
    start: tuple[Tensor, Tensor] | None,
    gates: Tensor,
    stream: Stream,
    shape: FusedShape,
    *,
    reverse: bool,
    plan: Plan | None = None,
) -> None:
    """Turn what each chunk adds into what enters it (leaves it, if reversed), in place."""
    start_s, start_z = (None, None) if start is None else (x.contiguous() for x in start)
    tensors = (states.s, states.z, start_s, start_z, states.end_s, states.end_z, gates)

    def arguments() -> Arguments:
        c = shape.config("scan")
        tiles = cdiv(shape.features * shape.value, c.rows) + cdiv(shape.features, c.rows)
        args = (
            *tensors, gates.shape[1], stream, shape.state_heads, gates.shape[2], shape.features, shape.value,
            shape.chunk, c.rows, shape.split, reverse, start is not None, states.end_s is not None, c.stages,
        )  # fmt: skip
        return (stream.ends - 1) * shape.state_heads * tiles, args, c.launch

    if stream.ends > 1:
        launch_planned(plan, "scan back" if reverse else "scan", scan_kernel, tensors, arguments)
