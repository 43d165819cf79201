"""The chunked op as torch.library sees it: launches, fake tensors, gradient.

Query row q_shift + r of a sequence meets key row k_shift + r (r < pairs): a window offset or anchors are only a shift.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunk_triton_bwd import key_kernel, row_kernel
from .chunk_triton_channel import channel_key_kernel, channel_output_kernel, channel_row_kernel
from .chunk_triton_config import SEGMENT, launch
from .chunk_triton_fwd import output_kernel
from .chunk_triton_scan import gate_sum_kernel, segment_scan_kernel, walk_kernel

GATE_NONE, GATE_HEAD, GATE_CHANNEL = 0, 1, 2


class Rows(NamedTuple):
    """Which rows meet, cut into chunks and segments; the trailing arguments of every kernel."""

    table: Tensor | None  # [N, 5] int64: first query row, first key row, rows, first chunk, first segment
    chunk_owner: Tensor | None  # [chunks] int32, sequence of each chunk, -1 past the last
    segment_owner: Tensor | None
    q_rows: int
    k_rows: int
    q_shift: int
    k_shift: int
    pairs: int
    sequences: int
    chunks: int
    segments: int
    span: int  # rows of a segment

    @property
    def place(self) -> tuple[int, ...]:
        return self.q_rows, self.k_rows, self.q_shift, self.k_shift, self.pairs


def plan_rows(q: Tensor, k: Tensor, table: Tensor | None, q_shift: int, k_shift: int, pairs: int, chunk: int) -> Rows:
    """Chunks and segments of N equal sequences, or of those in table [N, 3]; never asks the device for a number."""
    batch, q_rows, k_rows, span = q.shape[0], q.shape[1], k.shape[1], chunk * SEGMENT
    place = (q_rows, k_rows, q_shift, k_shift, pairs)
    if table is None:
        return Rows(
            None, None, None, *place, batch, batch * triton.cdiv(pairs, chunk), batch * triton.cdiv(pairs, span), span
        )
    n, total = table.shape[0], batch * min(q_rows, k_rows)
    columns, owners = [table], []
    for rows, least in ((chunk, 0), (span, 1)):
        ends = ((table[:, 2] + rows - 1) // rows).clamp(min=least).cumsum(0)
        owner = torch.searchsorted(ends, torch.arange(total // rows + n, device=q.device), right=True)
        owners.append(torch.where(owner < n, owner, -1).int())
        columns.append(torch.cat([ends.new_zeros(1), ends[:-1]]).unsqueeze(1))
    chunks, segments = owners
    return Rows(torch.cat(columns, 1), chunks, segments, *place, n, chunks.shape[0], segments.shape[0], span)


class Shape(NamedTuple):
    """Head counts, dims and dtypes that all kernels of one call share."""

    hq: int
    hk: int
    hs: int
    hg: int
    k: int
    v: int
    chunk: int
    gate: int
    operand: torch.dtype
    precision: str

    @property
    def operand_tl(self):
        return tl.bfloat16 if self.operand == torch.bfloat16 else tl.float32

    @property
    def dims(self) -> dict:
        """What every kernel takes."""
        return {
            "HQ": self.hq, "K": self.k, "V": self.v, "C": self.chunk, "OPERAND": self.operand_tl,
            "PRECISION": self.precision,
        }  # fmt: skip

    @property
    def constants(self) -> dict:
        """What the kernels for one number a head take."""
        return self.dims | {"HK": self.hk, "HS": self.hs, "HG": self.hg, "GATED": self.gate != GATE_NONE}

    @property
    def channel_constants(self) -> dict:
        """What the kernels for one number a channel take."""
        return self.dims | {"HK": self.hk, "LEVELS": self.chunk.bit_length() - 1}


def shape_of(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, chunk: int) -> Shape:
    """Computed factors of a product are bfloat16 for bfloat16 inputs only: float16 would overflow."""
    hq, hk = q.shape[2], k.shape[2]
    gate = GATE_NONE if g is None else (GATE_CHANNEL if g.ndim == 4 else GATE_HEAD)
    hg = 1 if g is None else g.shape[2]
    hs = hq if gate == GATE_HEAD and hg == hq else hk
    operand = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    precision = "tf32" if operand == torch.bfloat16 else PRECISION
    return Shape(hq, hk, hs, hg, k.shape[3], v.shape[3], chunk, gate, operand, precision)


PRECISION = "ieee"


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def gate_sums(g: Tensor | None, shape: Shape, rows: Rows) -> tuple[Tensor | None, Tensor | None]:
    """Local sums of one-number-a-head gates, in two parts; per-channel gates stay as they are."""
    if g is None or shape.gate == GATE_CHANNEL:
        return g, None
    hi, lo = torch.empty_like(g), torch.empty_like(g)
    block = min(8, triton.next_power_of_2(shape.hg))
    gate_sum_kernel[(rows.chunks * triton.cdiv(shape.hg, block),)](
        g, hi, lo, rows.table, rows.chunk_owner, rows.k_rows, rows.k_shift, rows.pairs,
        HG=shape.hg, C=shape.chunk, BH=block, VARLEN=rows.table is not None, num_warps=1,
    )  # fmt: skip
    return hi, lo


def chunk_states(
    a: Tensor, b: Tensor, gates: tuple[Tensor | None, Tensor | None], start: tuple[Tensor, Tensor] | None, shape: Shape,
    rows: Rows, *, scale: float = 1.0, normalize: bool = False, mass: Tensor | None = None, extra: Tensor | None = None,
    forward_states: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """States (S, z) before each chunk in walking order, those at the end of each sequence, and the gate cross terms.

    Forward with a = k, b = v; with a = q, b = do and ``mass`` the gradients of the states, walking backwards.
    """
    reverse, (hi, lo) = mass is not None, gates
    name = ("channel_" if shape.gate == GATE_CHANNEL else "") + ("walk_reverse" if reverse else "walk")
    cfg = launch(name, shape.k, shape.v, shape.hq // shape.hs, shape.operand.itemsize)
    n, kd, vd, hs = rows.sequences, shape.k, shape.v, shape.hs
    new = functools.partial(torch.empty, device=a.device, dtype=torch.float32)
    states = torch.empty(rows.chunks, hs, kd, vd, device=a.device, dtype=shape.operand)
    z_states = new(rows.chunks, hs, kd)
    s_out, z_out = new(n, hs, kd, vd), new(n, hs, kd)
    k_blocks, v_blocks = triton.cdiv(kd, cfg.block_k), triton.cdiv(vd, cfg.block_v)
    cross = None
    if forward_states is not None and shape.gate != GATE_NONE:
        tail = (v_blocks, kd) if shape.gate == GATE_CHANNEL else (v_blocks * k_blocks, 1)
        cross = new(rows.chunks, hs, *tail)
    per = rows.segments // n
    split = rows.table is not None or per > 1
    seg_states = new(rows.segments, hs, kd * (vd + 1)) if split else None
    seg_decay = new(rows.segments, hs, kd if shape.gate == GATE_CHANNEL else 1) if split else None
    s_in, z_in = (None, None) if start is None else start
    varlen = rows.table is not None
    fixed = {
        "HA": a.shape[2], "HB": b.shape[2], "HS": hs, "HG": shape.hg, "AG": shape.hq // hs if reverse else 1,
        "L": SEGMENT, "GATE": shape.gate, "NORMALIZE": normalize, "REVERSE": reverse, "VARLEN": varlen,
        "BK": cfg.block_k, "BV": cfg.block_v, **shape.dims, **cfg.options,
    }  # fmt: skip

    def walk(write: bool, init: int) -> None:
        walk_kernel[(rows.segments * hs * k_blocks * v_blocks,)](
            a, b, mass, extra, hi, lo, seg_states, seg_decay, s_in, z_in, states, z_states, s_out, z_out, cross,
            *(forward_states or (None, None)), rows.table, rows.segment_owner, scale, *rows.place,
            WRITE=write, INIT=init, CROSS=write and cross is not None, **fixed,
        )  # fmt: skip

    if split:
        walk(write=False, init=0)
        block = 512
        segment_scan_kernel[(n * hs * triton.cdiv(kd * (vd + 1), block),)](
            seg_states, seg_decay, s_in, z_in, rows.table, per, HS=hs, K=kd, V=vd, BLOCK=block, L=SEGMENT,
            C=shape.chunk, GATE=shape.gate, REVERSE=reverse, INIT=start is not None, VARLEN=varlen, num_warps=4,
        )  # fmt: skip
        walk(write=True, init=2)
    else:
        walk(write=True, init=0 if start is None else 1)
    return states, z_states, s_out, z_out, cross


def blank(
    like: Tensor, size: tuple[int, ...], covered: bool, fill: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    """An output tensor, filled only where kernels will not write all of it."""
    dtype = dtype or like.dtype
    return like.new_empty(size, dtype=dtype) if covered else like.new_full(size, fill, dtype=dtype)


@torch.library.custom_op("lizard_ops::gated_chunk", mutates_args=())
def gated_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s0: Tensor | None, z0: Tensor | None, table: Tensor | None,
    q_shift: int, k_shift: int, pairs: int, scale: float, normalize: bool, absorbed: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o, log mass, mass, final S, final z) of query rows that meet key rows; see the module's docstring.

    q [B,Tq,Hq,K], k [B,Tk,Hk,K], v [B,Tk,Hk,V]; g float32 [B,Tk,Hg] or [B,Tk,Hk,K]; s0 [N,Hs,K,V] and z0 [N,Hs,K]
    float32; table [N, 3] int64 (first query row, first key row, rows, through flattened rows) or None if all are equal.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    g = None if g is None else g.contiguous()
    shape, rows = shape_of(q, k, v, g, chunk), plan_rows(q, k, table, q_shift, k_shift, pairs, chunk)
    covered = table is None and pairs == q.shape[1] and q_shift == 0
    o = blank(q, (*q.shape[:3], shape.v), covered)
    log_mass = blank(q, q.shape[:3], covered, -float("inf"), torch.float32)
    mass = blank(q, q.shape[:3], covered, 0.0, torch.float32)
    if rows.chunks == 0 or pairs <= 0:
        return o, log_mass, mass, *carried(q, s0, z0, rows, shape)
    start = None if s0 is None or z0 is None else (s0.contiguous(), z0.contiguous())
    with on_device(q):
        gates = gate_sums(g, shape, rows)
        states, z_states, s, z, _ = chunk_states(k, v, gates, start, shape, rows)
        ends = o, log_mass, mass, rows.table, rows.chunk_owner, scale, *rows.place
        if shape.gate == GATE_CHANNEL:
            cfg = launch("channel_output", shape.k, shape.v, shape.hq // shape.hs, shape.operand.itemsize)
            channel_output_kernel[(rows.chunks * shape.hs * triton.cdiv(shape.v, cfg.block_v),)](
                q, k, v, g, states, z_states, *ends, NORMALIZE=normalize, **shape.channel_constants,
                **cfg.blocks, VARLEN=table is not None,
            )  # fmt: skip
        else:
            cfg = launch("output", shape.k, shape.v, shape.hq // shape.hs, shape.operand.itemsize)
            output_kernel[(rows.chunks * shape.hs * triton.cdiv(shape.v, cfg.block_v),)](
                q, k, v, *gates, states, z_states, *ends, NORMALIZE=normalize, ABSORBED=absorbed and g is not None,
                **shape.constants, **cfg.blocks, VARLEN=table is not None,
            )  # fmt: skip
    return o, log_mass, mass, s, z


def carried(like: Tensor, s0: Tensor | None, z0: Tensor | None, rows: Rows, shape: Shape) -> tuple[Tensor, Tensor]:
    """The state of a call without a single row."""
    if s0 is not None and z0 is not None:
        return s0.clone(), z0.clone()
    s = like.new_zeros(rows.sequences, shape.hs, shape.k, shape.v, dtype=torch.float32)
    return s, s.new_zeros(s.shape[:3])


@gated_chunk.register_fake
def _(q, k, v, g, s0, z0, table, q_shift, k_shift, pairs, scale, normalize, absorbed, chunk):
    n = q.shape[0] if table is None else table.shape[0]
    heads = q.shape[2] if g is not None and g.ndim == 3 and g.shape[2] == q.shape[2] else k.shape[2]
    float32 = torch.float32
    mass = q.new_empty(q.shape[:3], dtype=float32)
    s = q.new_empty((n, heads, k.shape[3], v.shape[3]), dtype=float32)
    z = q.new_empty((n, heads, k.shape[3]), dtype=float32)
    return q.new_empty((*q.shape[:3], v.shape[3])), torch.empty_like(mass), mass, s, z


@torch.library.custom_op("lizard_ops::gated_chunk_backward", mutates_args=())
def gated_chunk_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s0: Tensor | None, z0: Tensor | None, table: Tensor | None,
    mass: Tensor, d_o: Tensor, d_log_mass: Tensor, ds: Tensor, dz: Tensor, q_shift: int, k_shift: int,
    pairs: int, scale: float, normalize: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dg, ds0, dz0); dg is empty without a gate. States are recomputed."""
    q, k, v, d_o = q.contiguous(), k.contiguous(), v.contiguous(), d_o.contiguous()
    mass, d_log_mass = mass.contiguous(), d_log_mass.contiguous()
    g = None if g is None else g.contiguous()
    shape, rows = shape_of(q, k, v, g, chunk), plan_rows(q, k, table, q_shift, k_shift, pairs, chunk)
    all_q = table is None and pairs == q.shape[1] and q_shift == 0
    all_k = table is None and pairs == k.shape[1] and k_shift == 0
    dq, dk, dv = blank(q, q.shape, all_q), blank(k, k.shape, all_k), blank(v, v.shape, all_k)
    end = ds.contiguous(), dz.contiguous()
    if rows.chunks == 0 or pairs <= 0:
        return dq, dk, dv, (q.new_zeros(0) if g is None else torch.zeros_like(g)), end[0].clone(), end[1].clone()
    start = None if s0 is None or z0 is None else (s0.contiguous(), z0.contiguous())
    group, width = shape.hq // shape.hs, shape.operand.itemsize
    channel = shape.gate == GATE_CHANNEL
    common = shape.channel_constants if channel else shape.constants
    flags = {"NORMALIZE": normalize, "VARLEN": table is not None}
    place = rows.table, rows.chunk_owner, scale, *rows.place
    with on_device(q):
        gates = gate_sums(g, shape, rows)
        states = chunk_states(k, v, gates, start, shape, rows)[:2]

        cfg = launch("channel_row" if channel else "row", shape.k, shape.v, group, width)
        blocks = triton.cdiv(shape.k, cfg.block_k)
        grid = (rows.chunks * shape.hs * blocks,)
        extra, row_dot = torch.empty_like(mass), None
        if channel:
            row_dot = mass.new_empty(k.shape)
            channel_row_kernel[grid](
                q, k, v, g, *states, d_o, mass, d_log_mass, dq, extra, row_dot, *place, **common, **flags, **cfg.blocks
            )
        else:
            row_dot = mass.new_empty(blocks, *mass.shape) if g is not None else None
            row_kernel[grid](
                q, k, v, *gates, *states, d_o, mass, d_log_mass, dq, extra, row_dot, *place, mass.numel(), **common,
                **flags, **cfg.blocks,
            )  # fmt: skip

        d_states, dz_states, ds0, dz0, cross = chunk_states(
            q, d_o, gates, end, shape, rows, scale=scale, normalize=normalize, mass=mass, extra=extra,
            forward_states=states,
        )  # fmt: skip

        cfg = launch("channel_key" if channel else "key", shape.k, shape.v, group if shape.hs == shape.hk else 1, width)
        blocks = max(triton.cdiv(shape.k, cfg.block_k), triton.cdiv(shape.v, cfg.block_v))
        grid = (rows.chunks * shape.hk * blocks,)
        parts = 1 if cross is None else cross.shape[2]
        if channel:
            dg = blank(mass, k.shape, all_k)
            channel_key_kernel[grid](
                q, k, v, g, d_states, dz_states, d_o, mass, extra, row_dot, cross, dk, dv, dg, *place, PARTS=parts,
                **common, **flags, **cfg.blocks,
            )  # fmt: skip
            return dq, dk, dv, dg, ds0, dz0
        gates_out = None if g is None else blank(g, (blocks, *g.shape[:2], shape.hs), all_k)
        key_kernel[grid](
            q, k, v, *gates, d_states, dz_states, d_o, mass, extra, row_dot, cross, dk, dv, gates_out, *place,
            mass.numel(), 0 if gates_out is None else gates_out[0].numel(), PARTS=parts, **common, **flags, **cfg.blocks,
        )  # fmt: skip
    if gates_out is None:
        return dq, dk, dv, q.new_zeros(0), ds0, dz0
    dg = gates_out[0] if blocks == 1 else gates_out.sum(0)
    return dq, dk, dv, (dg.sum(2, keepdim=True) if shape.hg < shape.hs else dg), ds0, dz0


@gated_chunk_backward.register_fake
def _(q, k, v, g, s0, z0, table, mass, d_o, d_log_mass, ds, dz, q_shift, k_shift, pairs, scale, normalize, chunk):
    dg = q.new_empty(0) if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    like = [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg]
    return *like, ds.new_empty(ds.shape), dz.new_empty(dz.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, g, s0, z0, table, *numbers = inputs
    o, _, mass, s, z = output
    ctx.save_for_backward(q, k, v, g, s0, z0, table, mass)
    ctx.o_shape = o.shape
    q_shift, k_shift, pairs, scale, normalize, _, chunk = numbers
    ctx.numbers = (q_shift, k_shift, pairs, scale, normalize, chunk)
    ctx.state_shapes = s.shape, z.shape


def _backward(ctx, d_o, d_log_mass, d_mass, ds, dz):
    q, k, v, g, s0, z0, table, mass = ctx.saved_tensors
    d_o = q.new_zeros(ctx.o_shape) if d_o is None else d_o
    d_log_mass = torch.zeros_like(mass) if d_log_mass is None else d_log_mass
    ds = mass.new_zeros(ctx.state_shapes[0]) if ds is None else ds
    dz = mass.new_zeros(ctx.state_shapes[1]) if dz is None else dz
    dq, dk, dv, dg, ds0, dz0 = gated_chunk_backward(
        q, k, v, g, s0, z0, table, mass, d_o, d_log_mass, ds, dz, *ctx.numbers
    )
    no_state = s0 is None
    return dq, dk, dv, None if g is None else dg, None if no_state else ds0, None if no_state else dz0, *[None] * 8


gated_chunk.register_autograd(_backward, setup_context=_setup_context)
