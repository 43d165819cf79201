"""The chunked op as torch.library sees it: launches, fake tensors, gradient.

Query row q_shift + r of a sequence meets key row k_shift + r (r < pairs): a window offset or anchors are only a shift.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import argument_names, by_name, differentiable_once, in_order
from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.gated_attn.triton.bwd import key_kernel, row_kernel
from lizard_ops.gated_attn.triton.call import GATE_CHANNEL, GATE_NONE, ChunkPlan, GatedShape, plan_chunks, shape_of
from lizard_ops.gated_attn.triton.channel import (
    channel_key_kernel,
    channel_output_kernel,
    channel_row_kernel,
    channel_value_kernel,
    factor_kernel,
    key_sum_kernel,
)
from lizard_ops.gated_attn.triton.config import scan_launch
from lizard_ops.gated_attn.triton.fwd import output_kernel
from lizard_ops.gated_attn.triton.state import gate_sum_kernel, scan_kernel, state_kernel
from lizard_ops.tiles.launcher import launch_kernel


class Backward(NamedTuple):
    """What the gradient kernels read and share, and the row terms that the first of them leave for the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    mass: Tensor
    d_log_mass: Tensor
    extra: Tensor  # [B, T, Hq] e of ``bwd.py``
    own: Tensor  # [B, T, Hq] m of ``bwd.py``, or with a gate per channel the term of a query's own key
    gates: Gates
    shape: GatedShape
    rows: ChunkPlan
    flags: dict[str, bool]
    scale: float

    @property
    def place(self) -> tuple:
        """The arguments of every one of them that say where rows are."""
        return self.rows.table, self.rows.owner, self.scale, *self.rows.place


class KeyGradients(NamedTuple):
    """Where the gradients of the keys go, and what they take from the rows and the scan."""

    dk: Tensor
    dv: Tensor
    covered: bool  # whether every row of them is written
    row_dot: Tensor | None
    cross: Tensor | None


class Gates(NamedTuple):
    """What the kernels read of a gate: local sums in two parts (one per head), or decay factors (one per channel)."""

    first: Tensor | None = None  # [B, T, Hg] high part, or [chunks, Hk, levels + 2, C, K] decay factors
    second: Tensor | None = None  # [B, T, Hg] low part, or [chunks, Hk, blocks of K] int32 rows that need no levels
    decays: Tensor | None = None  # [chunks, Hs, 1 or K] log2 of each chunk's decay


def prepare_gates(g: Tensor | None, shape: GatedShape, rows: ChunkPlan) -> Gates:
    """Form them; the decays of one-number-a-head gates are left for ``state_kernel`` to write."""
    if g is None:
        return Gates()
    width = shape.k if shape.gate == GATE_CHANNEL else 1
    decays = g.new_empty(rows.chunks, shape.hs, width)
    place = rows.table, rows.owner, rows.k_rows, rows.k_shift, rows.pairs
    if shape.gate == GATE_CHANNEL:
        cfg, levels = shape.launch("factor"), shape.chunk.bit_length() - 1
        factors = g.new_empty(rows.chunks, shape.hk, levels + 2, shape.chunk, shape.k, dtype=shape.operand)
        near = g.new_empty(rows.chunks, shape.hk, cdiv(shape.k, cfg.rows), dtype=torch.int32)
        launch_kernel(
            factor_kernel, near.numel(),
            g, factors, decays, near, *place, HK=shape.hk, K=shape.k, C=shape.chunk, LEVELS=levels, BK=cfg.rows,
            VARLEN=rows.table is not None, OPERAND=shape.operand_tl, **cfg.options,
        )  # fmt: skip
        return Gates(factors, near, decays)
    hi, lo = torch.empty_like(g), torch.empty_like(g)
    block = min(8, power_of_2(shape.hg))
    launch_kernel(
        gate_sum_kernel, rows.chunks * cdiv(shape.hg, block),
        g, hi, lo, *place, HG=shape.hg, C=shape.chunk, BH=block, VARLEN=rows.table is not None, num_warps=1,
    )  # fmt: skip
    return Gates(hi, lo, decays)


def chunk_states(
    a: Tensor, b: Tensor, gates: Gates, start: tuple[Tensor, Tensor] | None, shape: GatedShape, rows: ChunkPlan, *,
    scale: float = 1.0, normalize: bool = False, mass: Tensor | None = None, extra: Tensor | None = None,
    forward: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """States (S, z) before each chunk, the states at each sequence's end, and the gate cross terms.

    Forward with a = k, b = v. With a = q, b = do, the mass, the row terms and the forward states: the gradients of the
    states after each chunk and at each sequence's start.
    """
    reverse, n, hs = forward is not None, rows.sequences, shape.hs
    new = functools.partial(torch.empty, device=a.device, dtype=torch.float32)
    states = torch.empty(rows.chunks, hs, shape.k, shape.v, device=a.device, dtype=shape.operand)
    z_states = new(rows.chunks, hs, shape.k)
    s_out, z_out = new(n, hs, shape.k, shape.v), new(n, hs, shape.k)
    cross = torch.empty_like(z_states) if reverse and shape.gate != GATE_NONE else None
    varlen, name = rows.table is not None, "state_reverse" if reverse else "state"
    cfg = shape.launch(("channel_" if shape.gate == GATE_CHANNEL else "") + name)
    launch_kernel(
        state_kernel, rows.chunks * hs * cdiv(shape.k, cfg.rows) * cdiv(shape.v, cfg.columns),
        a, b, mass, extra, gates.first, gates.second, states, z_states, gates.decays, rows.table, rows.owner, scale,
        *rows.place, HA=a.shape[2], HS=hs, HG=shape.hg, AG=shape.hq // hs if reverse else 1, BK=cfg.rows,
        BV=cfg.columns, GATE=shape.gate, TILES=shape.chunk.bit_length() + 1, NORMALIZE=normalize, REVERSE=reverse,
        VARLEN=varlen, **shape.dims, **cfg.options,
    )  # fmt: skip
    cfg = scan_launch(shape.v, shape.operand.itemsize)
    launch_kernel(
        scan_kernel, n * hs * cdiv(shape.k, cfg.rows),
        states, z_states, gates.decays, *(start or (None, None)), s_out, z_out, cross, *(forward or (None, None)),
        rows.table, rows.pairs, HS=hs, K=shape.k, V=shape.v, C=shape.chunk, BK=cfg.rows, BV=cfg.columns,
        GATE=shape.gate, REVERSE=reverse, INIT=start is not None, CROSS=cross is not None, VARLEN=varlen,
        STAGES=cfg.stages, num_warps=cfg.warps,
    )  # fmt: skip
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
    shape, rows = shape_of(q, k, v, g, chunk), plan_chunks(q, k, table, q_shift, k_shift, pairs, chunk)
    covered = table is None and pairs == q.shape[1] and q_shift == 0
    o = blank(q, (*q.shape[:3], shape.v), covered)
    log_mass = blank(q, q.shape[:3], covered, -float("inf"), torch.float32)
    mass = blank(q, q.shape[:3], covered, 0.0, torch.float32)
    if rows.chunks == 0 or pairs <= 0:
        return o, log_mass, mass, *carried(q, s0, z0, rows, shape)
    start = None if s0 is None or z0 is None else (s0.contiguous(), z0.contiguous())
    with on_device(q, features=shape.k, values=shape.v, chunk_size=chunk):
        gates = prepare_gates(g, shape, rows)
        states, z_states, s, z, _ = chunk_states(k, v, gates, start, shape, rows)
        ends = o, log_mass, mass, rows.table, rows.owner, scale, *rows.place
        if shape.gate == GATE_CHANNEL:
            cfg = shape.launch("channel_output")
            launch_kernel(
                channel_output_kernel, rows.chunks * shape.hs * cdiv(shape.v, cfg.columns),
                q, k, v, gates.first, gates.second, states, z_states, *ends, NORMALIZE=normalize,
                **shape.score_constants, BK=cfg.rows, BV=cfg.columns, VARLEN=table is not None, **cfg.options,
            )  # fmt: skip
        else:
            cfg = shape.launch("output", shape.hq // shape.hs)
            launch_kernel(
                output_kernel, rows.chunks * shape.hs * cdiv(shape.v, cfg.columns),
                q, k, v, gates.first, gates.second, states, z_states, *ends, NORMALIZE=normalize,
                ABSORBED=absorbed and g is not None, **shape.constants, GH=cfg.heads, BK=cfg.rows,
                BV=cfg.columns, VARLEN=table is not None, **cfg.options,
            )  # fmt: skip
    return o, log_mass, mass, s, z


def carried(
    like: Tensor, s0: Tensor | None, z0: Tensor | None, rows: ChunkPlan, shape: GatedShape
) -> tuple[Tensor, Tensor]:
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
    shape, rows = shape_of(q, k, v, g, chunk), plan_chunks(q, k, table, q_shift, k_shift, pairs, chunk)
    all_q = table is None and pairs == q.shape[1] and q_shift == 0
    all_k = table is None and pairs == k.shape[1] and k_shift == 0
    dq, dk, dv = blank(q, q.shape, all_q), blank(k, k.shape, all_k), blank(v, v.shape, all_k)
    end = ds.contiguous(), dz.contiguous()
    if rows.chunks == 0 or pairs <= 0:
        return dq, dk, dv, (q.new_zeros(0) if g is None else torch.zeros_like(g)), end[0].clone(), end[1].clone()
    start = None if s0 is None or z0 is None else (s0.contiguous(), z0.contiguous())
    channel = shape.gate == GATE_CHANNEL
    extra, own = torch.empty_like(mass), torch.empty_like(mass)
    with on_device(q, features=shape.k, values=shape.v, chunk_size=chunk):
        gates = prepare_gates(g, shape, rows)
        states = chunk_states(k, v, gates, start, shape, rows)[:2]
        x = Backward(
            q=q, k=k, v=v, d_o=d_o, mass=mass, d_log_mass=d_log_mass, extra=extra, own=own, gates=gates, shape=shape,
            rows=rows, flags={"NORMALIZE": normalize, "VARLEN": table is not None}, scale=scale,
        )  # fmt: skip
        row_dot = (_channel_rows if channel else _rows)(x, states, dq)
        *d_states, ds0, dz0, cross = chunk_states(
            q, d_o, gates, end, shape, rows, scale=scale, normalize=normalize, mass=mass, extra=extra, forward=states
        )
        ends = KeyGradients(dk=dk, dv=dv, covered=all_k, row_dot=row_dot, cross=cross)
        dg = (_channel_keys if channel else _keys)(x, d_states, ends)
    return dq, dk, dv, dg, ds0, dz0


def _rows(x: Backward, states: tuple[Tensor, Tensor], dq: Tensor) -> Tensor | None:
    cfg = x.shape.launch("row", x.shape.hq // x.shape.hs)
    blocks = cdiv(x.shape.k, cfg.rows)
    row_dot = x.mass.new_empty(blocks, *x.mass.shape) if x.shape.gate != GATE_NONE else None
    launch_kernel(
        row_kernel, x.rows.chunks * x.shape.hs * blocks,
        x.q, x.k, x.v, x.gates.first, x.gates.second, *states, x.d_o, x.mass, x.d_log_mass, dq, x.extra, x.own,
        row_dot, *x.place, x.mass.numel(), GH=cfg.heads, BK=cfg.rows, BV=cfg.columns,
        **x.shape.constants, **x.flags, **cfg.options,
    )  # fmt: skip
    return row_dot


def _keys(x: Backward, d_states: list[Tensor], ends: KeyGradients) -> Tensor:
    cfg = x.shape.launch("key")
    blocks = max(cdiv(x.shape.k, cfg.rows), cdiv(x.shape.v, cfg.columns))
    dg = None
    if x.shape.gate != GATE_NONE:
        dg = blank(x.mass, (blocks, *x.k.shape[:2], x.shape.hs), ends.covered)
    launch_kernel(
        key_kernel, x.rows.chunks * x.shape.hk * blocks,
        x.q, x.k, x.v, x.gates.first, x.gates.second, *d_states, x.d_o, x.mass, x.d_log_mass, x.own, ends.row_dot,
        ends.cross, ends.dk, ends.dv, dg, *x.place, x.mass.numel(), 0 if dg is None else dg[0].numel(), BQ=cfg.heads,
        BK=cfg.rows, BV=cfg.columns, **x.shape.constants, **x.flags, **cfg.options,
    )  # fmt: skip
    if dg is None:
        return x.q.new_zeros(0)
    dg = dg[0] if blocks == 1 else dg.sum(0)
    return dg.sum(2, keepdim=True) if x.shape.hg < x.shape.hs else dg


def _channel_rows(x: Backward, states: tuple[Tensor, Tensor], dq: Tensor) -> Tensor:
    key_sums, row_dot = x.mass.new_empty(x.k.shape), x.mass.new_empty(x.k.shape)
    shape, rows, gates = x.shape, x.rows, x.gates
    dims, exact = shape.channel_constants, {"PRECISION": shape.gate_precision}
    cfg = shape.launch("key_sum")
    launch_kernel(
        key_sum_kernel, rows.chunks * shape.hk * cdiv(shape.k, cfg.rows),
        x.k, gates.first, gates.second, states[1], key_sums, rows.table, rows.owner, rows.k_rows, rows.k_shift,
        rows.pairs, BK=cfg.rows, VARLEN=rows.table is not None,
        **{name: dims[name] for name in dims if name not in ("HQ", "V")} | exact, **cfg.options,
    )  # fmt: skip
    cfg = shape.launch("channel_row")
    launch_kernel(
        channel_row_kernel, rows.chunks * shape.hk * cdiv(shape.k, cfg.rows),
        x.q, x.k, x.v, gates.first, gates.second, states[0], key_sums, x.d_o, x.mass, x.d_log_mass, dq, x.extra, x.own,
        row_dot, *x.place, BK=cfg.rows, BV=cfg.columns, **dims, **x.flags, **cfg.options,
    )  # fmt: skip
    return row_dot


def _channel_keys(x: Backward, d_states: list[Tensor], ends: KeyGradients) -> Tensor:
    shape, rows, gates = x.shape, x.rows, x.gates
    dg = blank(x.mass, x.k.shape, ends.covered)
    cfg = shape.launch("channel_value")
    launch_kernel(
        channel_value_kernel, rows.chunks * shape.hk * cdiv(shape.v, cfg.columns),
        x.q, x.k, gates.first, gates.second, d_states[0], x.d_o, x.mass, ends.dv, *x.place, BK=cfg.rows,
        BV=cfg.columns, **shape.score_constants, **x.flags, **cfg.options,
    )  # fmt: skip
    cfg = shape.launch("channel_key")
    launch_kernel(
        channel_key_kernel, rows.chunks * shape.hk * cdiv(shape.k, cfg.rows),
        x.q, x.k, x.v, gates.first, gates.second, *d_states, x.d_o, x.mass, x.extra, x.own, ends.row_dot, ends.cross,
        ends.dk, dg, *x.place, BK=cfg.rows, BV=cfg.columns, GATE_PRECISION=shape.gate_precision,
        **shape.channel_constants, **x.flags, **cfg.options,
    )  # fmt: skip
    return dg


@gated_chunk_backward.register_fake
def _(q, k, v, g, s0, z0, table, mass, d_o, d_log_mass, ds, dz, q_shift, k_shift, pairs, scale, normalize, chunk):
    dg = q.new_empty(0) if g is None else torch.empty_like(g, memory_format=torch.contiguous_format)
    like = [q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg]
    return *like, ds.new_empty(ds.shape), dz.new_empty(dz.shape)


FORWARD, BACKWARD = (getattr(torch.ops.lizard_ops, name).default for name in ("gated_chunk", "gated_chunk_backward"))
TENSORS = ("q", "k", "v", "g", "s0", "z0", "table")
# the gradients that ``gated_chunk_backward`` returns, in its order
DIFFERENTIABLE = ("q", "k", "v", "g", "s0", "z0")


def _setup_context(ctx, inputs, output):
    given = by_name(FORWARD, inputs)
    o, _, mass, s, z = output
    ctx.save_for_backward(*(given[name] for name in TENSORS), mass)
    ctx.o_shape = o.shape
    ctx.numbers = {name: given[name] for name in argument_names(BACKWARD) if name in given and name not in TENSORS}
    ctx.state_shapes = s.shape, z.shape


def _backward(ctx, d_o, d_log_mass, d_mass, ds, dz):
    *tensors, mass = ctx.saved_tensors
    saved = dict(zip(TENSORS, tensors, strict=True))
    d_o = saved["q"].new_zeros(ctx.o_shape) if d_o is None else d_o
    d_log_mass = torch.zeros_like(mass) if d_log_mass is None else d_log_mass
    ds = mass.new_zeros(ctx.state_shapes[0]) if ds is None else ds
    dz = mass.new_zeros(ctx.state_shapes[1]) if dz is None else dz
    grads = gated_chunk_backward(**saved, **ctx.numbers, mass=mass, d_o=d_o, d_log_mass=d_log_mass, ds=ds, dz=dz)
    wanted = {name: grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if saved[name] is not None}
    return in_order(FORWARD, wanted)


gated_chunk.register_autograd(_backward, setup_context=_setup_context)
differentiable_once(gated_chunk_backward, "chunk_gated_attn")
