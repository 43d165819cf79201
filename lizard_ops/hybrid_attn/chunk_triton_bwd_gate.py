"""Backward of the gates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.hybrid_attn.chunk_triton_bwd_linear import RowTerms
from lizard_ops.hybrid_attn.chunk_triton_config import Shape
from lizard_ops.hybrid_attn.chunk_triton_state import States
from lizard_ops.hybrid_attn.chunk_triton_tiles import Rows, Stream, block_count, first_slot, locate


@triton.jit
def gate_gradient_kernel(
    dg, s, z, end_s, end_z, ds, dz, flow, received, tokens, stream,
    WINDOW: tl.constexpr, HQ: tl.constexpr, HS: tl.constexpr, F: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, HAS_END: tl.constexpr,
):  # fmt: skip
    """Gradient of the log-decay at each linear row, one column a state head.

    Gate l scales every weight of a query from l on with a key before l. Inside a chunk that is a reversed sum of what
    queries send less what keys receive; across its end it is the product of the state that leaves and its gradient,
    so no error travels from chunk to chunk. With WINDOW, gates between newest linear row and query see the flow too.
    """
    GROUP: tl.constexpr = HQ // HS
    head = tl.program_id(0) % HS
    extra = stream.prefix - stream.start
    n, block, batch, first, length = locate(tl.program_id(0) // HS, stream, extra, C)
    seen, known = length - stream.shift, length + extra
    i = tl.arange(0, C)
    r = block * C + i
    b_dg = tl.zeros([C], tl.float32)
    if block * C < seen:
        slot = first_slot(n, first, stream, C) + block
        entry = slot.to(tl.int64) * HS + head
        sent = tl.zeros([C], tl.float32)
        for head_q in tl.range(head * GROUP, head * GROUP + GROUP):
            out = (batch.to(tl.int64) * HQ + head_q) * tokens + first + stream.shift + r
            sent += tl.load(flow + out, mask=r < seen, other=0.0)
        b_dg = tl.cumsum(sent - tl.load(received + entry * C + i, mask=r < seen, other=0.0), 0, reverse=True)
        last = (block + 1) * C >= seen
        if HAS_END or not last:
            p_s, p_z = s + (entry + HS) * F * V, z + (entry + HS) * F
            fixed = n.to(tl.int64) * HS + head
            f, d = tl.arange(0, 16), tl.arange(0, BV)
            through = tl.zeros([16], tl.float32)
            for f0 in tl.range(0, F, 16):
                where_z = f0 + f
                where_s = where_z[:, None] * V + d[None, :]
                mask = (where_z < F)[:, None] & (d < V)[None, :]
                if HAS_END and last:
                    b_s = tl.load(end_s + fixed * F * V + where_s, mask=mask, other=0.0)
                    b_z = tl.load(end_z + fixed * F + where_z, mask=where_z < F, other=0.0)
                else:
                    b_s = tl.load(p_s + where_s, mask=mask, other=0.0).to(tl.float32)
                    b_z = tl.load(p_z + where_z, mask=where_z < F, other=0.0)
                b_ds = tl.load(ds + entry * F * V + where_s, mask=mask, other=0.0).to(tl.float32)
                b_dz = tl.load(dz + entry * F + where_z, mask=where_z < F, other=0.0)
                through += tl.sum(b_s * b_ds, 1) + b_z * b_dz
            b_dg += tl.sum(through, 0)
        b_dg = tl.where(r < seen, b_dg, 0.0)
    for head_q in tl.range(head * GROUP, head * GROUP + GROUP):
        for j in tl.range(block * C - WINDOW, (block + 1) * C if WINDOW > 0 else 0, 32):
            query = j + tl.arange(0, 32)  # its linear row
            out = (batch.to(tl.int64) * HQ + head_q) * tokens + first + stream.shift + query
            sent_ahead = tl.load(flow + out, mask=(query >= 0) & (query < seen), other=0.0)
            near = (query[None, :] < r[:, None]) & (query[None, :] >= r[:, None] - WINDOW)
            b_dg += tl.sum(tl.where(near, sent_ahead[None, :], 0.0), 1)
    row = first + n * extra
    p_dg = dg.ptr + batch.to(tl.int64) * dg.batch + (row + r).to(tl.int64) * dg.time + head
    tl.store(p_dg, b_dg, mask=r < known)


def gate_gradients(
    g: Tensor, states: States, d_states: States, has_end: bool, terms: RowTerms, received: Tensor, stream: Stream,
    shape: Shape,
) -> Tensor:  # fmt: skip
    """Gradient of g, float32."""
    dg = torch.empty(*g.shape[:2], shape.state_heads, dtype=torch.float32, device=g.device)
    blocks = block_count(stream, stream.prefix - stream.start, shape.chunk)
    if blocks:
        gate_gradient_kernel[(blocks * shape.state_heads,)](
            Rows(dg, *dg.stride()[:2], 1), *states, d_states.s, d_states.z, terms.flow, received,
            terms.flow.shape[2], stream, shape.window if shape.outside else 0, shape.query_heads, shape.state_heads,
            shape.features, shape.value, shape.value_block, shape.chunk, has_end, num_warps=4,
        )  # fmt: skip
    heads = g.shape[2]
    return dg.unflatten(2, (heads, shape.state_heads // heads)).sum(-1) if heads != shape.state_heads else dg
