"""Hybrid attention with kept keys between states on the GPU: prefill, whole or in pieces. There is no backward yet.

The rows of the keys are those of a carried state, its kept ones in order of position and its ring, and the new ones;
queries are the new rows alone. What the kernels cannot know of the carried keys is how far they have decayed by the
first query: PyTorch sums that up.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.common.places import most
from lizard_ops.common.row_decays import Decays
from lizard_ops.common.rows import over_rows
from lizard_ops.common.state import AttentionState
from lizard_ops.common.streams import Layout, anchor_rows, final_ring, gather_rows, layout_of, per_head
from lizard_ops.gated_attn.expiring import decays_of
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.expiring import with_expiries
from lizard_ops.hybrid_attn.triton.call import chosen
from lizard_ops.hybrid_attn.triton.fwd import hybrid_output
from lizard_ops.hybrid_attn.triton.kept_gates import entering_gates
from lizard_ops.hybrid_attn.triton.kept_index import entering, index_of
from lizard_ops.hybrid_attn.triton.kept_op import described
from lizard_ops.hybrid_attn.triton.op import empty
from lizard_ops.hybrid_attn.triton.state import chunk_states, running_gates
from lizard_ops.hybrid_attn.triton.units import unit_gates
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
    o, s, z, log_scale = kept_prefill(
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


@torch.library.custom_op("lizard_ops::hybrid_kept_prefill", mutates_args=())
def kept_prefill(
    q: Tensor,  # [B, T, Hq, D]
    k: Tensor,  # [B, rows, Hk, D]
    v: Tensor,  # [B, rows, Hk, V]
    fq: Tensor,  # [B, T, Hq, Fp]
    fk: Tensor,  # [B, rows, Hk, Fp] if outside, else [B, T, Hk, Fp]
    g: Tensor | None,  # [B, T, Hg]
    weight: Tensor | None,  # alpha or merge bias [B, T, Hq] float32
    sink: Tensor | None,  # [Hq] log of the sink mass
    anchor_k: Tensor | None,  # [B, A, Hk, D]; None: the first rows
    anchor_v: Tensor | None,
    s: Tensor | None,  # [B, Hs, F, V]
    z: Tensor | None,  # [B, Hs, F]
    log_scale: Tensor | None,  # [B, Hs] of s and z
    past: Tensor | None,  # [B, Hs, rows - T] of the carried keys, as ``past_of`` gives it
    position: Tensor | None,  # [B] of the first query; None: 0, and no carried state
    lengths: Tensor | None,  # [B] tokens of right-padded rows
    expiry: Tensor,  # [B, rows, Hk] int64 from the first query on, -1 for what is no key
    kept_keys: int,
    window: int,
    anchors: int,
    outside: bool,
    late: bool,
    mix: str,  # "sum", "absolute" or "relative"
    normalize: bool,
    feature_map: str,
    scale: float,
    feature_scale: float,
    softcap: float | None,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final s, final z, their log scale); the last three are empty without ``final``, the log without any."""
    x, options, shape, stream = described(locals() | {"cu_seqlens": None})
    prefix = expiry.shape[1] - q.shape[1]
    stream = stream._replace(prefix=prefix, start=prefix)
    with on_device(q, dim=shape.dim, values=shape.value, features=shape.features):
        index = index_of(expiry, kept_keys, stream, shape, late or not outside)
        linear_v, end_log = None, empty(q, 0)
        if outside:
            fk, linear_v = entering(fk, index.source, stream), entering(v, index.source, stream)
            gates, end_log = entering_gates(fk, g, index, stream, shape, past, log_scale)
            rows = stream._replace(position=None, prefix=0, start=0)  # of which none is an anchor
            states = chunk_states(fk, linear_v, gates, x.start, rows, dataclasses.replace(shape, anchors=0), final)
        else:
            if feature_map == "exp":
                gates, end_log = unit_gates(fk, g, log_scale, stream, shape)
            else:
                gates = running_gates(g, stream, shape)
            states = chunk_states(fk, v, gates, x.start, stream, shape, final)
        o, _ = hybrid_output(x, options, states, gates, stream, shape, linear_v, index.kept)
    if states.end_s is None or states.end_z is None:
        return o, empty(q, 0), empty(q, 0), empty(q, 0)
    if outside and g is not None and q.shape[1]:
        lost = lost_sums(gates, layout_of(q, None, None, lengths), shape.chunk)
        end_log = end_log.masked_fill(lost, -math.inf)
        states.end_s.masked_fill_(lost[..., None, None], 0.0)
        states.end_z.masked_fill_(lost[..., None], 0.0)
    return o, states.end_s, states.end_z, end_log


def lost_sums(gates: Tensor, layout: Layout, chunk: int) -> Tensor:
    """[B, Hs] whether no key of a sequence's sums has outlived its last reset, as its last row's log mass tells."""
    batch = layout.length.shape[0]
    of_rows = gates[2].unflatten(0, (batch, -1))
    last = ((layout.length - 1).clamp(min=0) // chunk).view(-1, 1, 1).expand(-1, 1, gates.shape[2])
    lost = of_rows[..., -1].gather(1, last).squeeze(1) == -math.inf
    return lost & (layout.length > 0).unsqueeze(1)


@kept_prefill.register_fake
def _(
    q, k, v, fq, fk, g, weight, sink, anchor_k, anchor_v, s, z, log_scale, past, position, lengths, expiry, kept_keys,
    window, anchors, outside, late, mix, normalize, feature_map, scale, feature_scale, softcap, final,
):  # fmt: skip
    _, _, shape, _ = described(locals() | {"cu_seqlens": None})
    end, logs = (q.shape[0], shape.state_heads, shape.features), final and (outside or feature_map == "exp")
    return (
        empty(q, *q.shape[:3], v.shape[3], dtype=q.dtype),
        empty(q, *end, v.shape[3]) if final else empty(q, 0),
        empty(q, *end) if final else empty(q, 0),
        empty(q, *end[:2]) if logs else empty(q, 0),
    )  # fmt: skip
