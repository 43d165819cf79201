"""Backward of the gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.triton.bwd_linear import KeyTerms, RowTerms
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.state import States
from lizard_ops.tiles.decays import decay_since_start, load_gates
from lizard_ops.tiles.places import Stream, first_rows, first_slot, locate_in_stream, stream_blocks
from lizard_ops.tiles.plans import Arguments, Plan, launch_planned
from lizard_ops.tiles.strided import at, strided_heads
from lizard_ops.tiles.widths import power_of_two


@triton.jit
def gate_gradient_kernel(
    dg, s, z, ds, dz, gates, flow, entered, near, far, sent, rows_total, slots, tokens, stream,
    WINDOW: tl.constexpr, BW: tl.constexpr, HQ: tl.constexpr, HS: tl.constexpr, HG: tl.constexpr, F: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradient of the log-decay at each linear row, one column per state head.

    Gate l scales every weight of a query from l on with a key before l. In its chunk those are what queries from l on
    send less what keys from l on receive; with earlier chunks, what queries from l on got through the state; with
    later ones, what keys before l give to it; and between earlier and later ones, the product of the state that enters
    and the gradient of what leaves. No error travels from chunk to chunk. With WINDOW, gates between newest linear row
    and query see the flow too.
    """
    GROUP: tl.constexpr = HQ // HS
    head = tl.program_id(0) % HS
    extra = stream.prefix - stream.start
    n, block, batch, first, length = locate_in_stream(tl.program_id(0) // HS, stream, extra, C)
    _, linear_row, _, _ = first_rows(n, first, stream, 0)
    seen, known = length - stream.shift, length + extra
    i = tl.arange(0, C)
    r = block * C + i
    b_dg = tl.zeros([C], tl.float32)
    if block * C < seen:
        slot = first_slot(n, first, stream, C) + block
        entry = slot.to(tl.int64) * HS + head
        b_sent, b_entered = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        for head_q in tl.range(head * GROUP, head * GROUP + GROUP):
            out = (batch.to(tl.int64) * HQ + head_q) * tokens + first + stream.shift + r
            if PARTS > 0:
                b_entered += tl.load(entered + out, mask=r < seen, other=0.0)
                for block_of_keys in tl.static_range(PARTS):
                    b_sent += tl.load(sent + block_of_keys * rows_total + out, mask=r < seen, other=0.0)
            else:
                b_sent += tl.load(flow + out, mask=r < seen, other=0.0)
        b_near = tl.load(near + entry * C + i, mask=r < seen, other=0.0)
        b_far = tl.load(far + entry * C + i, mask=r < seen, other=0.0)
        f, d = tl.arange(0, 16), tl.arange(0, BV)
        through = tl.zeros([16, BV], tl.float32)
        through_z = tl.zeros([16], tl.float32)
        for f0 in tl.range(0, F, 16, num_stages=3):
            where_z = f0 + f
            where_s = where_z[:, None] * V + d[None, :]
            mask = (where_z < F)[:, None] & (d < V)[None, :]
            b_s = tl.load(s + entry * F * V + where_s, mask=mask, other=0.0).to(tl.float32)
            through += b_s * tl.load(ds + entry * F * V + where_s, mask=mask, other=0.0).to(tl.float32)
            b_z = tl.load(z + entry * F + where_z, mask=where_z < F, other=0.0)
            through_z += b_z * tl.load(dz + entry * F + where_z, mask=where_z < F, other=0.0)
        whole, part = load_gates(gates, slot, slots, head // (HS // HG), C - 1, HG, C, SPLIT)
        b_dg = tl.cumsum(b_sent - b_near, 0, reverse=True) + tl.cumsum(b_entered, 0, reverse=True)
        b_dg += (tl.cumsum(b_far, 0) - b_far) + (tl.sum(through) + tl.sum(through_z)) * decay_since_start(
            whole, part, SPLIT
        )
        b_dg = tl.where(r < seen, b_dg, 0.0)
    if WINDOW > 0:  # flow of the queries r - WINDOW to r - 1: those before the block, less who leaves, and who comes
        r0, before = block * C, block * C - WINDOW + tl.arange(0, BW)
        flow_before, flow_in, flow_out = (
            tl.zeros([BW], tl.float32),
            tl.zeros([C], tl.float32),
            tl.zeros([C], tl.float32),
        )
        for head_q in tl.range(head * GROUP, head * GROUP + GROUP):
            p_flow = flow + (batch.to(tl.int64) * HQ + head_q) * tokens + first + stream.shift
            flow_before += tl.load(p_flow + before, mask=(before >= 0) & (before < r0) & (before < seen), other=0.0)
            flow_in += tl.load(p_flow + r - 1, mask=(i > 0) & (r - 1 < seen), other=0.0)
            flow_out += tl.load(
                p_flow + r - 1 - WINDOW, mask=(i > 0) & (r > WINDOW) & (r - 1 - WINDOW < seen), other=0.0
            )
        come_and_gone = tl.cumsum(flow_in.to(tl.float64) - flow_out.to(tl.float64), 0)
        b_dg += (tl.sum(flow_before.to(tl.float64), 0) + come_and_gone).to(tl.float32)
    p_dg = at(dg, batch, linear_row, head) + r.to(tl.int64) * dg.time
    tl.store(p_dg, b_dg, mask=r < known)


def gate_gradients(
    g: Tensor, states: States, d_states: States, gates: Tensor, terms: RowTerms, keys: KeyTerms, stream: Stream,
    shape: FusedShape, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Gradient of g, float32. plan: of a known kind of call."""
    dg = g.new_empty(*g.shape[:2], shape.state_heads, dtype=torch.float32)
    blocks, heads = stream_blocks(stream, stream.prefix - stream.start, shape.chunk), g.shape[2]
    tensors = (dg, states.s, states.z, d_states.s, d_states.z, gates, terms.flow, terms.entered, *keys)

    def arguments() -> Arguments:
        window = shape.window if shape.outside else 0
        args = (
            strided_heads(dg), *tensors[1:], terms.flow.numel(), gates.shape[1], terms.flow.shape[2], stream, window,
            power_of_two(window), shape.query_heads, shape.state_heads, gates.shape[2], shape.features, shape.value,
            shape.value_block, shape.chunk, 0 if keys.sent is None else keys.sent.shape[0], shape.split,
        )  # fmt: skip
        return blocks * shape.state_heads, args, {"num_warps": 4}

    if blocks:
        launch_planned(plan, "gates' gradient", gate_gradient_kernel, tensors, arguments)
    return dg.unflatten(2, (heads, shape.state_heads // heads)).sum(-1) if heads != shape.state_heads else dg
