"""Hybrid attention with kept keys between states on the GPU: prefill, whole or in pieces.

The rows of the keys are those of a carried state, its kept ones in order of position and its ring, and the new ones;
queries are the new rows alone. What the kernels cannot know of the carried keys is how far they have decayed by the
first query: PyTorch sums that up.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common.places import most
from lizard_ops.common.row_decays import Decays
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import Layout, anchor_rows, final_ring, gather_rows, layout_of, per_head
from lizard_ops.gated_attn.expiring import decays_of
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.expiring import with_expiries
from lizard_ops.hybrid_attn.triton.call import chosen
from lizard_ops.hybrid_attn.triton.kept_prefill import kept_prefill
from lizard_ops.key_expiry.triton.chunk import expiry_rows

Fields = dict[str, Tensor | None]


def kept_between_states(inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of ``chunk_hybrid_attn`` with scores and a state, carried or asked for."""

    def op(x, lengths):
        o, final = of_rows(x, lengths, options)
        return [o], final

    (o,), state = over_rows(op, inputs, (0.0,), options.offset)
    return o, state


def of_rows(
    x: HybridInputs, lengths: Tensor | None, options: HybridOptions
) -> tuple[Tensor, AttentionState | None]:  # fmt: skip
    """The same of right-padded rows."""
    x, scored = with_expiries(x, lengths, options, expiry_rows)
    k, v, fk, state, sinks, final = x.k, x.v, x.fk, x.initial_state, x.sinks, options.output_final_state
    layout, carried = layout_of(x.q, state, None, lengths), state is not None
    held = AttentionState(layout.position) if state is None else state
    anchor_k = anchor_v = None
    if options.anchors:
        anchor_k = anchor_rows(k, held.anchor_k, options.anchors, layout)
        anchor_v = anchor_rows(v, held.anchor_v, options.anchors, layout)
    rows = KeyRows(state, options, layout, k.shape[1])
    all_k, all_v, all_fk, decays = rows.of(k, "k"), rows.of(v, "v"), fk, None
    if options.outside:
        all_fk = rows.of(fk, "fk")
        decays = None if x.g is None else decays_of(to_heads(x.g, v.shape[2]), held, layout)
    past = None if decays is None else past_of(decays, rows.prefix if options.late or not carried else options.window)
    if past is not None:  # kept keys are among the sums, unless they enter them late
        past = F.pad(past, (rows.prefix - past.shape[2], 0))
    weight = x.weight
    o, s, z, log_scale, *_ = kept_prefill(
        q=x.q,
        k=all_k,
        v=all_v,
        fq=x.fq,
        fk=all_fk,
        g=None if x.g is None else x.g.float(),
        weight=None if weight is None else weight.float().expand(x.q.shape[:3]),
        sink=None if sinks is None else sinks.float().logsumexp(-1),
        anchor_k=anchor_k if carried else None,
        anchor_v=anchor_v if carried else None,
        s=held.s,
        z=held.z,
        log_scale=held.log_scale,
        past=past,
        position=layout.position if carried else None,
        lengths=lengths,
        expiry=x.expiry,
        kept_keys=most(options.kept_keys),
        late=options.late,
        **chosen(options)._asdict(),
        final=final,
    )
    if not final:
        return o, None
    fields: Fields = {"anchor_k": anchor_k, "anchor_v": anchor_v}
    for name, x_all in {"k": all_k, "v": all_v, **({"fk": all_fk} if options.outside else {})}.items():
        fields[f"ring_{name}"] = rows.ring(x_all)
        if options.late or name != "fk":
            fields[f"kept_{name}"] = gather_rows(x_all, x.kept_rows)
    if decays is not None:
        fields["ring_g"] = final_ring(x.g, held.ring_g, options.window, layout)
        if options.late:
            fields["kept_g"] = kept_gates(decays, x.kept_rows, x.g)
    logs = options.outside or options.feature_map == "exp"
    fields |= {"s": s, "z": z, "log_scale": log_scale if logs else None}
    return o, AttentionState(layout.end, **(fields | scored))


class KeyRows:
    """The rows of the keys, kept | ring | new, and the final ring among them: indices that all fields share."""

    def __init__(self, state: AttentionState | None, options: HybridOptions, layout: Layout, length: int) -> None:
        window, batch, device = options.window, layout.start.shape[0], layout.start.device
        self.state, self.prefix = state, 0 if state is None else most(options.kept_keys) + window
        slot, row = torch.arange(window, device=device), torch.arange(batch, device=device).unsqueeze(1)
        self.order = ((layout.position.unsqueeze(1) + slot) % window + row * window).flatten()
        back = (layout.end.unsqueeze(1) - 1 - slot) % window  # rows between the slot's position and the newest
        last = layout.length.unsqueeze(1) + (self.prefix - 1) - back
        self.unseen = None if self.prefix else last < 0
        self.last = last.clamp(min=0) + row * (self.prefix + length)

    def of(self, x: Tensor, name: str) -> Tensor:
        """Rows [B, rows, Hk, dim] of the new ones x [B, T, Hk, dim] and the fields of this name."""
        if self.state is None:
            return x
        kept, ring = getattr(self.state, f"kept_{name}"), getattr(self.state, f"ring_{name}")
        if kept is None:  # no row of these is read
            kept = ring.new_zeros(len(ring), self.prefix - ring.shape[1], *ring.shape[2:])
        ring = ring.flatten(0, 1).index_select(0, self.order).view_as(ring)
        return torch.cat([kept.to(x.dtype), ring.to(x.dtype), x], 1)

    def ring(self, rows: Tensor) -> Tensor:
        """The ring [B, W, Hk, dim] after them: slot t % W holds position t, slots never written are zero."""
        if not rows.shape[1]:
            return rows.new_zeros(*self.last.shape, *rows.shape[2:])
        found = rows.flatten(0, 1).index_select(0, self.last.flatten()).unflatten(0, self.last.shape)
        return found if self.unseen is None else found.masked_fill(self.unseen[..., None, None], 0.0)


def to_heads(g: Tensor, heads: int) -> Tensor:
    """Gates [B, T, Hk or Hq], one for all heads as one of each."""
    return g.expand(-1, -1, heads) if g.shape[2] == 1 else g


def past_of(decays: Decays, prefix: int) -> Tensor | None:
    """[B, H, prefix] float64 log-decay from each carried key up to the first query, -inf after a reset."""
    if not prefix:
        return None
    sums, resets = (x[:, prefix - 1 : prefix] - x[:, :prefix] for x in decays)
    return sums.masked_fill(resets > 0, -math.inf).transpose(1, 2).contiguous()


def kept_gates(decays: Decays, kept_rows: Tensor, g: Tensor) -> Tensor:
    """``AttentionState.kept_g`` of the keys of these rows [B, P, Hk]."""
    if not decays.sums.shape[1]:
        return g.new_zeros(*kept_rows.shape[:2], decays.sums.shape[2])
    then = Decays(*(gather_rows(x, kept_rows) for x in decays))
    found = (decays.sums[:, -1:] - then.sums).masked_fill(decays.resets[:, -1:] > then.resets, -math.inf)
    return found.masked_fill(per_head(kept_rows, found) < 0, 0.0).to(g.dtype)
