"""The hybrid kernels as operators of torch.library: launches, shapes for tracing, autograd."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.direct import direct, is_watched, nobody_looks, recorded
from lizard_ops.common.dispatch import on_device
from lizard_ops.common.flat import by_name, differentiable_once, in_order, taken
from lizard_ops.hybrid_attn.triton.bwd_gate import gate_gradients
from lizard_ops.hybrid_attn.triton.bwd_linear import empty_terms, linear_keys, linear_queries, query_states
from lizard_ops.hybrid_attn.triton.bwd_window import window_keys, window_queries
from lizard_ops.hybrid_attn.triton.call import FusedInputs, FusedOptions, Known, Pair, describe, pair
from lizard_ops.hybrid_attn.triton.config import FusedShape
from lizard_ops.hybrid_attn.triton.fwd import Masses, hybrid_output
from lizard_ops.hybrid_attn.triton.kept_gates import held_gradients, past_gradients
from lizard_ops.hybrid_attn.triton.kept_index import Index, entering, from_entering
from lizard_ops.hybrid_attn.triton.state import States, chunk_states, running_gates
from lizard_ops.hybrid_attn.triton.units import unit_gates
from lizard_ops.tiles.log2 import LOG2E
from lizard_ops.tiles.places import Stream, slot_count
from lizard_ops.tiles.plans import Plan


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


@torch.library.custom_op("lizard_ops::hybrid_attn_forward", mutates_args=())
def hybrid_forward(
    q: Tensor,  # [B, T, Hq, D]
    k: Tensor,  # [B, P + T, Hk, D], or [1, N P + T, Hk, D] with cu_seqlens
    v: Tensor,  # the same with V
    fq: Tensor,  # [B, T, Hq, Fp]
    fk: Tensor,  # the linear rows of k: all of them if outside, else the new ones; [B, ., Hk, Fp]
    g: Tensor | None,  # like fk, [B, ., Hg]
    weight: Tensor | None,  # alpha or merge bias [B, T, Hq] float32
    sink: Tensor | None,  # [Hq] log of the sink mass
    anchor_k: Tensor | None,  # [N, A, Hk, D]; None: the first rows of each sequence (P = 0)
    anchor_v: Tensor | None,
    s: Tensor | None,  # [N, Hs, F, V]
    z: Tensor | None,  # [N, Hs, F]
    position: Tensor | None,  # [N] of the first query; None: 0, and P = 0
    cu_seqlens: Tensor | None,  # [N + 1]
    lengths: Tensor | None,  # [N] tokens of right-padded rows
    window: int,
    anchors: int,
    outside: bool,
    mix: str,  # "sum", "absolute" or "relative"
    normalize: bool,
    feature_map: str,
    scale: float,
    feature_scale: float,
    final: bool,
    softcap: float | None = None,
    log_scale: Tensor | None = None,  # [N, Hs] of s and z, with exponential features
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, final s, final z, their log scale, running gates, masses...).

    The final sums are empty without ``final``, the log scale without exponential features.
    """
    given = locals()
    return forward(taken(FusedInputs, given), taken(FusedOptions, given), final)


def forward(x: FusedInputs, options: FusedOptions, final: bool, known: Known | None = None) -> tuple[Tensor, ...]:
    """What ``hybrid_forward`` returns. known: of a kind of call without a state, which comes again."""
    o, states, log_scale, gates, masses = launches(x, options, final, known)
    log_scale = empty(x.q, 0) if log_scale is None else log_scale
    if states.end_s is None or states.end_z is None:
        return o, empty(x.q, 0), empty(x.q, 0), log_scale, gates, *masses
    return o, states.end_s, states.end_z, log_scale, gates, *masses


class Launched(NamedTuple):
    """What the launches of a forward call leave."""

    o: Tensor
    states: States
    log_scale: Tensor | None  # of the final sums, with exponential features
    gates: Tensor
    masses: Masses


def launches(
    x: FusedInputs, options: FusedOptions, final: bool, known: Known | None = None, plan: Plan | None = None
) -> Launched:
    """Those of ``forward``. plan: of the launches, that of what is known if None."""
    shape, stream = describe(x, options) if known is None else known.described(x)
    q, plan = x.q, known.plan if plan is None and known is not None else plan
    with on_device(q, dim=shape.dim, values=shape.value, features=shape.features):
        end_log = None
        if options.feature_map == "exp":
            gates, end_log = unit_gates(x.fk, x.g, x.log_scale, stream, shape)
        else:
            gates = running_gates(x.g, stream, shape, plan)
        states = chunk_states(x.fk, x.v, gates, x.start, stream, shape, final, plan)
        o, masses = hybrid_output(x, options, states, gates, stream, shape, plan=plan)
    return Launched(o, states, end_log, gates, masses)


@hybrid_forward.register_fake
def _(
    q, k, v, fq, fk, g, weight, sink, anchor_k, anchor_v, s, z, position, cu_seqlens, lengths, window, anchors, outside,
    mix, normalize, feature_map, scale, feature_scale, final, softcap=None, log_scale=None,
):  # fmt: skip
    given = locals()
    shape, stream = describe(taken(FusedInputs, given), taken(FusedOptions, given))
    full = (q.shape[0], q.shape[2], q.shape[1])
    some = full if mix == "relative" else (0,)
    end, exp = (stream.ends - 1, shape.state_heads, shape.features), feature_map == "exp"
    gate_heads = shape.state_heads if exp else 1 if g is None else g.shape[2]
    return (
        empty(q, *q.shape[:3], v.shape[3], dtype=q.dtype),
        empty(q, *end, v.shape[3]) if final else empty(q, 0),
        empty(q, *end) if final else empty(q, 0),
        empty(q, *end[:2]) if exp else empty(q, 0),
        empty(q, 5 if exp else 3, slot_count(stream, shape.chunk), gate_heads, shape.chunk),
        empty(q, *full), empty(q, *full), empty(q, *some), empty(q, *some, dtype=torch.int32),
    )  # fmt: skip


class Found(NamedTuple):
    """What a forward call leaves for its backward, and the gradients that come in."""

    o: Tensor
    gates: Tensor
    masses: Masses
    d_o: Tensor
    d_end: Pair | None  # of the final sums


class Gradients(NamedTuple):
    """Of the tensors of a call, by their names in ``FusedInputs``; empty for those that are absent."""

    q: Tensor
    k: Tensor
    v: Tensor
    fq: Tensor
    fk: Tensor
    g: Tensor
    weight: Tensor
    sink: Tensor
    anchor_k: Tensor
    anchor_v: Tensor
    s: Tensor
    z: Tensor
    past: Tensor  # of the decays of carried keys, [B, Hs, prefix] float64


def of_entering(stream: Stream, shape: FusedShape) -> tuple[Stream, FusedShape]:
    """Those of the rows of keys as they enter the sums: the queries' own, of which none is an anchor."""
    return stream._replace(position=None, prefix=0, start=0), dataclasses.replace(shape, anchors=0)


def gradients(
    x: FusedInputs, options: FusedOptions, found: Found, shape: FusedShape, stream: Stream, gate_gradient: bool,
    index: Index | None = None, of_heads: bool = True, plan: Plan | None = None,
) -> Gradients:  # fmt: skip
    """What ``hybrid_backward`` returns, and more. index: of keys with an expiry. of_heads: whether those of q, k, v and
    carried anchors are asked for; else they may be empty, or not what they should be. plan: of a known kind of call
    without either."""
    q, fq, g, s = x.q, x.fq, x.g, x.s
    _, gates, masses, d_o, d_end = found
    enters = index is not None and options.outside
    rows, linear = x, (stream, shape)
    with on_device(q, dim=shape.dim, values=shape.value, features=shape.features):
        if index is not None and enters:
            rows = x._replace(fk=entering(x.fk, index.source, stream), v=entering(x.v, index.source, stream))
            linear = of_entering(stream, shape)
        states = chunk_states(rows.fk, rows.v, gates, x.start, *linear, end=False, plan=plan)
        terms, average = empty_terms(masses, gate_gradient and shape.exact_gates), None

        def of_queries(terms):
            return window_queries(x, options, d_o, masses, terms, stream, shape, index, plan)

        if not shape.merge:
            dq, average = of_queries(terms)
        dfq = linear_queries(rows, options, states, gates, found.o, d_o, masses, average, terms, *linear, plan)
        states = states._replace(phi=None)  # what is dead is let go at once: the peak is the sum of what is left
        if shape.merge and shape.exact:
            dq, _ = of_queries(terms)
        d_states = query_states(fq, d_o, gates, terms, d_end, *linear, s is not None, plan)
        dv, dfk, key_terms = linear_keys(
            rows.v, fq, rows.fk, d_o, gates, terms, d_states, *linear, gate_gradient, plan
        )  # fmt: skip
        del rows
        dg, d_past = empty(q, 0), empty(q, 0)
        if key_terms is not None:
            dg = gate_gradients(g, states, d_states, gates, terms, key_terms, *linear, plan)
            if index is not None and enters:
                dg += held_gradients(g, key_terms, index, stream, shape)
                d_past = past_gradients(key_terms, index, stream, shape) if stream.prefix else d_past
        d_start = (empty(q, 0), empty(q, 0)) if s is None else (d_states.end_s, d_states.end_z)
        del states, d_states, key_terms
        terms = terms._replace(slope=None, offset=None, entered=None)
        if index is not None and enters:
            dfk, dv = from_entering(dfk, index.entries, stream), from_entering(dv, index.entries, stream)
        dk = da_k = da_v = empty(q, 0)
        if of_heads:
            dk, da_k, da_v = window_keys(x, options, d_o, dv, masses, terms, stream, shape, index, plan)
        if not shape.exact:
            dq = of_queries(terms)[0] if of_heads else empty(q, 0)
        d_sink = empty(q, 0)
        if x.sink is not None:  # p_sink times the shift that every score shares
            there = masses.window.isfinite()
            part = torch.exp2(x.sink[:, None] * LOG2E.value - masses.window) * terms.shift
            d_sink = part.where(there, 0.0).sum((0, 2)).to(x.sink.dtype)
    d_weight = terms.flow if average is None else average
    del terms, average
    d_weight = empty(q, 0) if x.weight is None else d_weight.transpose(1, 2).contiguous()
    return Gradients(dq, dk, dv, dfq, dfk, dg, d_weight, d_sink, da_k, da_v, *d_start, d_past)


@torch.library.custom_op("lizard_ops::hybrid_attn_backward", mutates_args=())
def hybrid_backward(
    q: Tensor, k: Tensor, v: Tensor, fq: Tensor, fk: Tensor, g: Tensor | None, weight: Tensor | None,
    sink: Tensor | None, anchor_k: Tensor | None, anchor_v: Tensor | None, s: Tensor | None, z: Tensor | None,
    position: Tensor | None, cu_seqlens: Tensor | None, lengths: Tensor | None,
    window: int, anchors: int, outside: bool, mix: str, normalize: bool, feature_map: str, scale: float,
    feature_scale: float, softcap: float | None,
    o: Tensor, gates: Tensor, linear: Tensor, log_window: Tensor, spread: Tensor, top_key: Tensor,
    d_o: Tensor, d_s: Tensor | None, d_z: Tensor | None, gate_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first twelve arguments of ``hybrid_forward``; those of absent ones are empty."""
    given = locals()
    x, options = taken(FusedInputs, given), taken(FusedOptions, given)
    row = Found(o, gates, Masses(linear=linear, window=log_window, spread=spread, top_key=top_key), d_o, pair(d_s, d_z))
    del given
    return gradients(x, options, row, *describe(x, options), gate_gradient)[:12]


@hybrid_backward.register_fake
def _(
    q, k, v, fq, fk, g, weight, sink, anchor_k, anchor_v, s, z, position, cu_seqlens, lengths, window, anchors, outside,
    mix, normalize, feature_map, scale, feature_scale, softcap, o, gates, linear, log_window, spread, top_key, d_o, d_s,
    d_z, gate_gradient,
):  # fmt: skip
    def like(x):
        return empty(q, 0) if x is None else empty(q, *x.shape, dtype=x.dtype)

    dg = like(g) if gate_gradient else empty(q, 0)
    return *map(like, (q, k, v, fq, fk)), dg, *map(like, (weight, sink, anchor_k, anchor_v, s, z))


FORWARD = torch.ops.lizard_ops.hybrid_attn_forward.default
# the gradients that ``hybrid_backward`` returns, in its order
DIFFERENTIABLE = ("q", "k", "v", "fq", "fk", "g", "weight", "sink", "anchor_k", "anchor_v", "s", "z")


def in_full(
    o: Tensor, end_shape: torch.Size, d_o: Tensor | None, d_s: Tensor | None, d_z: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the output and of the final sums, zeros for one that nobody asked for; none of sums without both."""
    d_o = torch.zeros_like(o) if d_o is None else d_o
    if d_s is None and d_z is None:
        return d_o, None, None
    d_s = torch.zeros(end_shape, device=o.device) if d_s is None else d_s
    return d_o, d_s, torch.zeros(end_shape[:-1], device=o.device) if d_z is None else d_z


def _save(ctx, inputs, output):
    given = by_name(FORWARD, inputs)
    o, end_s, _, _, gates, linear, log_window, spread, top_key = output
    tensors = {name: given[name] for name in FusedInputs._fields if name != "log_scale"} | {
        "o": o, "gates": gates, "linear": linear, "log_window": log_window, "spread": spread, "top_key": top_key,
    }  # fmt: skip
    ctx.names = tuple(tensors)
    ctx.save_for_backward(*tensors.values())
    ctx.end_shape = end_s.shape
    ctx.options = {name: given[name] for name in FusedOptions._fields}
    ctx.set_materialize_grads(False)


def _backward(ctx, d_o, d_s, d_z, *_):
    saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    d_o, d_s, d_z = in_full(saved["o"], ctx.end_shape, d_o, d_s, d_z)
    gate_gradient = by_name(FORWARD, ctx.needs_input_grad)["g"]
    backward = direct(hybrid_backward, *saved.values(), d_o, d_s, d_z)
    grads = backward(**saved, **ctx.options, d_o=d_o, d_s=d_s, d_z=d_z, gate_gradient=gate_gradient)
    wanted = {name: grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if saved[name] is not None}
    return in_order(FORWARD, wanted)


hybrid_forward.register_autograd(_backward, setup_context=_save)
differentiable_once(hybrid_backward, "chunk_hybrid_attn")


class _Hybrid(torch.autograd.Function):
    """``hybrid_forward`` without the dispatch of a registered op, which takes longer than its launches."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = direct(hybrid_forward)(*inputs)
        _save(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


record_hybrid = recorded(_Hybrid)


def hybrid(x: FusedInputs, options: FusedOptions, final: bool, known: Known | None = None) -> tuple[Tensor, ...]:
    """``hybrid_forward``; a registered operator for those who look at operators. known: as for ``forward``."""
    if nobody_looks(*x):
        return forward(x, options, final, known)
    given = x._asdict() | options._asdict() | {"final": final}
    return hybrid_forward(**given) if is_watched() else record_hybrid(*in_order(FORWARD, given))
