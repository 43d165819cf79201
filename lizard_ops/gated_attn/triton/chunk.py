"""``chunk_gated_attn`` on Triton kernels: what stands around the registered op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common.checks import want
from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.rows import changed_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import Layout, key_stream, layout_of, offset_fields, sliding_sum, stream_seqlens
from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions
from lizard_ops.gated_attn.triton.config import CHUNK
from lizard_ops.gated_attn.triton.op import gated_chunk

ABSORBED_BOUND = 80.0  # exp(80) is the most that float32 holds with room for the sums


def chunk_gated_triton(inputs: GatedInputs, options: GatedOptions) -> tuple[Tensor, AttentionState | None, Tensor]:
    """``chunk_gated_attn`` for arguments that its api has checked: (o, state, log mass).

    bfloat16, float16 and float32; gates and state stay float32. chunk_size is 16, 32, 64 (None) or 128.
    gate_form="absorbed" reads the largest gate sum back: the one synchronisation. Raises ValueError for another
    chunk_size, or a gate beyond the bound of the absorbed form.
    """
    chunk = CHUNK if options.chunk_size is None else options.chunk_size
    want(chunk in (16, 32, 64, 128), "chunk_size", chunk, "16, 32, 64, 128 or None with impl='triton'")
    plan = None if inputs.padding_mask is None else compaction(inputs.padding_mask)
    if plan is not None:
        inputs = changed_rows(inputs, lambda x: compact(x, plan))
    o, state, log_mass = _attend(inputs, None if plan is None else plan.lengths, options, chunk)
    if plan is not None:
        o, log_mass = restore(o, plan), restore(log_mass, plan, -math.inf)
    return o, state if options.output_final_state else None, log_mass


def _attend(
    inputs: GatedInputs, lengths: Tensor | None, options: GatedOptions, chunk: int
) -> tuple[Tensor, AttentionState, Tensor]:
    q, k, v, g, state, cu_seqlens = inputs.q, inputs.k, inputs.v, inputs.g, inputs.initial_state, inputs.cu_seqlens
    offset, anchors, normalize = options.window_offset, options.anchors, options.normalize
    layout = layout_of(q, state, cu_seqlens, lengths)
    ring = state if state is not None and offset else AttentionState(layout.position)
    keys, values = key_stream(k, ring.ring_fk, layout), key_stream(v, ring.ring_v, layout)
    gates = None if g is None else key_stream(g.float(), ring.ring_g, layout)
    waiting = 0 if state is not None else offset  # queries before the first that meets a key
    table, shift = None, waiting + anchors
    if cu_seqlens is not None or lengths is not None or (state is not None and anchors):
        table = _meeting_rows(layout, offset if state is not None else 0, waiting, anchors, keys)
        shift = 0
    if options.gate_form == "absorbed" and gates is not None:
        _check_absorbed(gates, chunk)

    queries, top, past = q, None, None
    if offset and gates is not None:
        past = _gates_in_between(gates, offset, state is not None, layout)  # [B, T, Hg(, K)]
        if past.ndim == 4:
            queries, top = _decayed_queries(q, past)
    s0, z0 = (None, None) if state is None or state.s is None or state.z is None else (state.s.float(), state.z.float())
    o, log_mass, _, s, z = gated_chunk(
        q=queries,
        k=keys,
        v=values,
        g=gates,
        s0=s0,
        z0=z0,
        table=table,
        q_shift=shift,
        k_shift=0 if table is not None else anchors,
        pairs=q.shape[1] - shift,
        scale=options.scale,
        normalize=normalize,
        absorbed=options.gate_form == "absorbed",
        chunk=chunk,
    )
    if past is not None:
        top = _spread_heads(past, q.shape[2]) if top is None else top
        log_mass = log_mass + top
        if normalize:
            o = o.masked_fill((top == -math.inf).unsqueeze(-1), 0.0)
        else:
            o = (o * top.exp().unsqueeze(-1)).to(o.dtype)
    return o, AttentionState(position=layout.end, s=s, z=z, **offset_fields(k, v, g, state, offset, layout)), log_mass


def _meeting_rows(layout: Layout, prefix: int, waiting: int, anchors: int, keys: Tensor) -> Tensor:
    """[N, 3]: first query row, first key row and rows that meet, of each sequence (``gated_chunk``'s table)."""
    skip = (anchors - (layout.position - prefix)).clamp(min=0) if anchors else torch.zeros_like(layout.length)
    skip = torch.minimum(skip, layout.length)
    if layout.cu_seqlens is not None:
        first = stream_seqlens(layout, prefix)[:-1]
    else:
        first = torch.arange(keys.shape[0], device=keys.device) * keys.shape[1]
    rows = (layout.length - skip - waiting).clamp(min=0)
    return torch.stack([layout.start + waiting + skip, first + skip, rows], 1)


def _gates_in_between(gates: Tensor, offset: int, carried: bool, layout: Layout) -> Tensor:
    """The sum of the ``offset`` log-decays up to each query's own, [B, T, Hg(, K)]: what its newest key has missed."""
    sums = sliding_sum(gates, offset)
    if not carried:
        return sums
    if layout.cu_seqlens is None:
        return sums[:, offset:]
    at = torch.arange(gates.shape[1] - offset * layout.length.shape[0], device=gates.device)
    owner = torch.searchsorted(layout.cu_seqlens.long(), at, right=True)
    return sums.index_select(1, at + owner * offset)


def _spread_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hg, ...] repeated over the query heads of each gate."""
    return x.repeat_interleave(heads // x.shape[2], 2)


def _decayed_queries(q: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Queries times the decay since their newest key, channel by channel, and the row shift taken out of it."""
    top = past.detach().amax(-1)
    top = torch.where(top > -math.inf, top, 0.0)
    decay = (past - top.unsqueeze(-1)).exp()
    return (q * _spread_heads(decay, q.shape[2])).to(q.dtype), _spread_heads(top, q.shape[2])


def _check_absorbed(gates: Tensor, chunk: int) -> None:
    """exp(-G) inside a chunk must stay finite: the sums of the log-decays of every chunk, whatever the packing."""
    want(gates.ndim == 3, "gate_form", "absorbed", "'stable' with a gate per channel")
    if gates.shape[1] == 0:
        return
    worst = sliding_sum(gates.detach(), min(chunk, gates.shape[1])).amin().item()
    bound = f'"stable": log-decays sum to {worst:.1f} over {chunk} tokens, and -{ABSORBED_BOUND:.0f} is the bound'
    want(worst > -ABSORBED_BOUND, "gate_form", "absorbed", bound)
