"""The hybrid kernels for keys with an expiry, as operators of torch.library, without a state.

The window branch is that of every call, and each block of queries goes on over the keys that it has kept. The linear
branch of coverage="outside" runs the kernels of coverage="all" on the keys in the order in which they expire, with the
gates of ``kept_gates.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import by_name, differentiable_once, in_order, taken
from lizard_ops.hybrid_attn.triton.call import FusedInputs, FusedOptions, describe
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.fwd import Masses, hybrid_output
from lizard_ops.hybrid_attn.triton.kept_gates import KeptShape, entering_gates
from lizard_ops.hybrid_attn.triton.kept_index import Index, empty_index, entering, index_of
from lizard_ops.hybrid_attn.triton.op import Found, empty, gradients, of_entering
from lizard_ops.hybrid_attn.triton.state import chunk_states, running_gates
from lizard_ops.hybrid_attn.triton.units import unit_gates
from lizard_ops.tiles.places import Stream, slot_count

ABSENT = dict.fromkeys(("anchor_k", "anchor_v", "s", "z", "position"))  # what a carried state brings


def described(given: dict[str, Any]) -> tuple[FusedInputs, FusedOptions, FusedShape, Stream]:
    """A call's tensors and choices, and the shape and stream of its linear rows: each query's own."""
    x, options = taken(FusedInputs, ABSENT | given), taken(FusedOptions, given)
    shape, stream = describe(x, options._replace(outside=False))
    if options.outside:
        shape = KeptShape(**{field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)})
    return x, options, shape, stream


@torch.library.custom_op("lizard_ops::hybrid_kept_forward", mutates_args=())
def kept_forward(
    q: Tensor,  # [B, T, Hq, D]
    k: Tensor,  # [B, T, Hk, D]
    v: Tensor,  # [B, T, Hk, V]
    fq: Tensor,  # [B, T, Hq, Fp]
    fk: Tensor,  # [B, T, Hk, Fp]
    g: Tensor | None,  # [B, T, Hg]
    weight: Tensor | None,  # alpha or merge bias [B, T, Hq] float32
    sink: Tensor | None,  # [Hq] log of the sink mass
    cu_seqlens: Tensor | None,  # [N + 1]
    lengths: Tensor | None,  # [N] tokens of right-padded rows
    expiry: Tensor,  # [B, T, Hk] int64
    kept_keys: int,
    window: int,
    anchors: int,
    outside: bool,
    late: bool,  # keys enter the sums when they expire, else when they leave the window
    mix: str,  # "sum", "absolute" or "relative"
    normalize: bool,
    feature_map: str,
    scale: float,
    feature_scale: float,
    softcap: float | None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """(o, running gates, masses..., index...)."""
    x, options, shape, stream = described(locals())
    with on_device(q, dim=shape.dim, values=shape.value, features=shape.features):
        index = index_of(expiry, kept_keys, stream, shape, late or not outside)
        gates, fk, linear_v = linear_rows(x, options, index, stream, shape)
        rows = of_entering(stream, shape) if outside else (stream, shape)
        states = chunk_states(fk, v if linear_v is None else linear_v, gates, None, *rows, end=False)
        o, masses = hybrid_output(x, options, states, gates, stream, shape, linear_v, index.kept)
    return o, gates, *masses, *index


def linear_rows(
    x: FusedInputs, options: FusedOptions, index: Index, stream: Stream, shape: FusedShape
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gates, fk and v of the linear rows), v None where it is that of the keys."""
    if options.outside:
        fk, v = entering(x.fk, index.source, stream), entering(x.v, index.source, stream)
        return entering_gates(fk, x.g, index, stream, shape)[0], fk, v
    exp = options.feature_map == "exp"
    return unit_gates(x.fk, x.g, None, stream, shape)[0] if exp else running_gates(x.g, stream, shape), x.fk, None


@kept_forward.register_fake
def _(
    q, k, v, fq, fk, g, weight, sink, cu_seqlens, lengths, expiry, kept_keys, window, anchors, outside, late, mix,
    normalize, feature_map, scale, feature_scale, softcap,
):  # fmt: skip
    _, _, shape, stream = described(locals())
    full = (q.shape[0], q.shape[2], q.shape[1])
    some = full if mix == "relative" else (0,)
    gate_heads = shape.state_heads if shape.keyed else 1 if g is None else g.shape[2]
    return (
        empty(q, *q.shape[:3], v.shape[3], dtype=q.dtype),
        empty(q, 5 if shape.keyed else 3, slot_count(stream, shape.chunk), gate_heads, shape.chunk),
        empty(q, *full), empty(q, *full), empty(q, *some), empty(q, *some, dtype=torch.int32),
        *empty_index(expiry, kept_keys, stream, shape, late or not outside),
    )  # fmt: skip


@torch.library.custom_op("lizard_ops::hybrid_kept_backward", mutates_args=())
def kept_backward(
    q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, g: Tensor | None, weight: Tensor | None,
    sink: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
    window: int, anchors: int, outside: bool, mix: str, normalize: bool, feature_map: str, scale: float,
    feature_scale: float, softcap: float | None,
    o: Tensor, gates: Tensor, linear: Tensor, log_window: Tensor, spread: Tensor, top_key: Tensor,
    ends: Tensor, source: Tensor, alive: Tensor, count: Tensor, carried: Tensor, carried_count: Tensor, left: Tensor,
    d_o: Tensor, gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first eight arguments of ``kept_forward``; those of absent ones are empty."""
    given = locals()
    x, options, shape, stream = described(given)
    masses, index = Masses(linear=linear, window=log_window, spread=spread, top_key=top_key), taken(Index, given)
    del given
    return gradients(x, options, Found(o, gates, masses, d_o, None), shape, stream, gate_gradient, index)[:8]


@kept_backward.register_fake
def _(
    q, k, v, fq, fk, g, weight, sink, cu_seqlens, lengths, window, anchors, outside, mix, normalize, feature_map, scale,
    feature_scale, softcap, o, gates, linear, log_window, spread, top_key, ends, source, alive, count, carried,
    carried_count, left, d_o, gate_gradient,
):  # fmt: skip
    def like(x):
        return empty(q, 0) if x is None else empty(q, *x.shape, dtype=x.dtype)

    return *map(like, (q, k, v, fq, fk)), like(g) if gate_gradient else empty(q, 0), like(weight), like(sink)


FORWARD = torch.ops.lizard_ops.hybrid_kept_forward.default
# the gradients that ``kept_backward`` returns, in its order
DIFFERENTIABLE = ("q", "k", "v", "fq", "fk", "g", "weight", "sink")
OUTPUTS = ("o", "gates", *Masses._fields, *Index._fields)


def _save(ctx, inputs, output):
    given = by_name(FORWARD, inputs)
    names = (*DIFFERENTIABLE, "cu_seqlens", "lengths")
    tensors = {name: given[name] for name in names}
    tensors |= {"log_window" if name == "window" else name: x for name, x in zip(OUTPUTS, output, strict=True)}
    ctx.names = tuple(tensors)
    ctx.save_for_backward(*tensors.values())
    ctx.options = {name: given[name] for name in FusedOptions._fields}
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, *_):
    saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    if d_o is None:
        return in_order(FORWARD, {})
    gate_gradient = by_name(FORWARD, ctx.needs_input_grad)["g"]
    grads = kept_backward(**saved, **ctx.options, d_o=d_o, gate_gradient=gate_gradient)
    wanted = {name: grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if saved[name] is not None}
    return in_order(FORWARD, wanted)


kept_forward.register_autograd(_backward, setup_context=_save)
differentiable_once(kept_backward, "chunk_hybrid_attn")
