"""The hybrid kernels for kept keys between states, as operators of torch.library.

Rows of keys are those of a carried state, its kept ones in order of position and its ring, before the new ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import by_name, differentiable_once, in_order, taken
from lizard_ops.common.streams import Layout, layout_of
from lizard_ops.hybrid_attn.triton.call import FusedInputs, FusedOptions, pair
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.fwd import Masses, hybrid_output
from lizard_ops.hybrid_attn.triton.kept_gates import entering_gates
from lizard_ops.hybrid_attn.triton.kept_index import Index, empty_index, entering, index_of
from lizard_ops.hybrid_attn.triton.kept_op import described
from lizard_ops.hybrid_attn.triton.op import Found, Gradients, empty, gradients, in_full, of_entering
from lizard_ops.hybrid_attn.triton.state import chunk_states, running_gates
from lizard_ops.hybrid_attn.triton.units import unit_gates
from lizard_ops.tiles.places import Stream, slot_count


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
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor,
]:  # fmt: skip
    """(o, final s, final z, their log scale, running gates, masses..., index...).

    The final sums are empty without ``final``, their log scale where nothing has one.
    """
    x, options, shape, stream = prefilled(locals())
    with on_device(q, dim=shape.dim, values=shape.value, features=shape.features):
        index = index_of(expiry, kept_keys, stream, shape, late or not outside)
        linear_v, end_log = None, empty(q, 0)
        if outside:
            fk, linear_v = entering(fk, index.source, stream), entering(v, index.source, stream)
            gates, end_log = entering_gates(fk, g, index, stream, shape, past, log_scale)
            states = chunk_states(fk, linear_v, gates, x.start, *of_entering(stream, shape), final)
        else:
            if feature_map == "exp":
                gates, end_log = unit_gates(fk, g, log_scale, stream, shape)
            else:
                gates = running_gates(g, stream, shape)
            states = chunk_states(fk, v, gates, x.start, stream, shape, final)
        o, masses = hybrid_output(x, options, states, gates, stream, shape, linear_v, index.kept)
    found = (gates, *masses, *index)
    if states.end_s is None or states.end_z is None:
        return o, empty(q, 0), empty(q, 0), empty(q, 0), *found
    if outside and g is not None and q.shape[1]:
        lost = lost_sums(gates, layout_of(q, None, None, lengths), shape.chunk)
        end_log = end_log.masked_fill(lost, -math.inf)
        states.end_s.masked_fill_(lost[..., None, None], 0.0)
        states.end_z.masked_fill_(lost[..., None], 0.0)
    return o, states.end_s, states.end_z, end_log, *found


def prefilled(given: dict[str, Any]) -> tuple[FusedInputs, FusedOptions, FusedShape, Stream]:
    """``described`` of a call whose keys have rows before those of the queries."""
    x, options, shape, stream = described(given | {"cu_seqlens": None})
    prefix = x.k.shape[1] - x.q.shape[1]
    return x, options, shape, stream._replace(prefix=prefix, start=prefix)


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
    _, _, shape, stream = prefilled(locals())
    end, logs = (q.shape[0], shape.state_heads, shape.features), final and (outside or feature_map == "exp")
    full = (q.shape[0], q.shape[2], q.shape[1])
    some = full if mix == "relative" else (0,)
    gate_heads = shape.state_heads if shape.keyed else 1 if g is None else g.shape[2]
    return (
        empty(q, *q.shape[:3], v.shape[3], dtype=q.dtype),
        empty(q, *end, v.shape[3]) if final else empty(q, 0),
        empty(q, *end) if final else empty(q, 0),
        empty(q, *end[:2]) if logs else empty(q, 0),
        empty(q, 5 if shape.keyed else 3, slot_count(stream, shape.chunk), gate_heads, shape.chunk),
        empty(q, *full), empty(q, *full), empty(q, *some), empty(q, *some, dtype=torch.int32),
        *empty_index(expiry, kept_keys, stream, shape, late or not outside),
    )  # fmt: skip


@torch.library.custom_op("lizard_ops::hybrid_kept_prefill_backward", mutates_args=())
def kept_prefill_backward(
    q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, g: Tensor | None, weight: Tensor | None,
    sink: Tensor | None, anchor_k: Tensor | None, anchor_v: Tensor | None, s: Tensor | None, z: Tensor | None,
    past: Tensor | None, log_scale: Tensor | None, position: Tensor | None, lengths: Tensor | None,
    window: int, anchors: int, outside: bool, mix: str, normalize: bool, feature_map: str, scale: float,
    feature_scale: float, softcap: float | None,
    o: Tensor, gates: Tensor, linear: Tensor, log_window: Tensor, spread: Tensor, top_key: Tensor,
    ends: Tensor, source: Tensor, alive: Tensor, count: Tensor, carried: Tensor, carried_count: Tensor, left: Tensor,
    d_o: Tensor, d_s: Tensor | None, d_z: Tensor | None, gate_gradient: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """Gradients of the first thirteen arguments; those of absent ones are empty."""
    given = locals()
    x, options, shape, stream = prefilled(given)
    masses, index = Masses(linear=linear, window=log_window, spread=spread, top_key=top_key), taken(Index, given)
    del given
    layout = layout_of(q, None, None, lengths)
    if d_s is not None and d_z is not None and outside and g is not None and q.shape[1]:
        lost = lost_sums(gates, layout, shape.chunk)
        d_s, d_z = d_s.masked_fill(lost[..., None, None], 0.0), d_z.masked_fill(lost[..., None], 0.0)
    found = gradients(x, options, Found(o, gates, masses, d_o, pair(d_s, d_z)), shape, stream, gate_gradient, index)
    if s is not None and log_scale is not None:  # sums of nothing, in whose place any others would be nothing too
        nothing = (log_scale == -math.inf) & (layout.length > 0).unsqueeze(1)
        found.s.masked_fill_(nothing[..., None, None], 0.0)
        found.z.masked_fill_(nothing[..., None], 0.0)
    return tuple(found)


@kept_prefill_backward.register_fake
def _(
    q, k, v, fq, fk, g, weight, sink, anchor_k, anchor_v, s, z, past, log_scale, position, lengths, window, anchors,
    outside, mix, normalize, feature_map, scale, feature_scale, softcap, o, gates, linear, log_window, spread, top_key,
    ends, source, alive, count, carried, carried_count, left, d_o, d_s, d_z, gate_gradient,
):  # fmt: skip
    def like(x):
        return empty(q, 0) if x is None else empty(q, *x.shape, dtype=x.dtype)

    dg, d_past = (like(x if gate_gradient else None) for x in (g, past))
    return *map(like, (q, k, v, fq, fk)), dg, *map(like, (weight, sink, anchor_k, anchor_v, s, z)), d_past


FORWARD = torch.ops.lizard_ops.hybrid_kept_prefill.default
DIFFERENTIABLE = Gradients._fields
OUTPUTS = ("o", "end_s", "end_z", "end_log", "gates", *Masses._fields, *Index._fields)


def _save(ctx, inputs, output):
    given = by_name(FORWARD, inputs)
    tensors = {name: given[name] for name in (*DIFFERENTIABLE, "log_scale", "position", "lengths")}
    found = dict(zip(OUTPUTS, output, strict=True))
    ctx.end_shape = found["end_s"].shape
    tensors |= {"log_window" if name == "window" else name: x for name, x in found.items() if "end_" not in name}
    ctx.names = tuple(tensors)
    ctx.save_for_backward(*tensors.values())
    ctx.options = {name: given[name] for name in FusedOptions._fields}
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_s, d_z, *_):
    saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    d_o, d_s, d_z = in_full(saved["o"], ctx.end_shape, d_o, d_s, d_z)
    wanted = by_name(FORWARD, ctx.needs_input_grad)
    gate_gradient = wanted["g"] or wanted["past"]
    grads = kept_prefill_backward(**saved, **ctx.options, d_o=d_o, d_s=d_s, d_z=d_z, gate_gradient=gate_gradient)
    found = {name: grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if saved[name] is not None}
    return in_order(FORWARD, {name: grad for name, grad in found.items() if wanted[name]})


kept_prefill.register_autograd(_backward, setup_context=_save)
differentiable_once(kept_prefill_backward, "chunk_hybrid_attn")
