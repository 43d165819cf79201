"""The launches of ``hybrid_heads``, and its one node of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lizard_ops.common.direct import recorded
from lizard_ops.common.state import AttentionState
from lizard_ops.feature_projection.triton import op as projection
from lizard_ops.hybrid_attn.arguments import HybridInputs
from lizard_ops.hybrid_attn.heads import Heads
from lizard_ops.hybrid_attn.triton.call import FusedInputs, Known
from lizard_ops.hybrid_attn.triton.chunk import chunk_hybrid_triton
from lizard_ops.hybrid_attn.triton.fwd import Masses
from lizard_ops.hybrid_attn.triton.op import Found, gradients, hybrid_backward, launches
from lizard_ops.rotary import triton_op as rotary
from lizard_ops.tiles.plans import Plan
from lizard_ops.tiles.replay import replayed

NO_MORE = (None,) * 9  # sinks, anchors, sums, positions and ends, which a call without a state has not


def hybrid_heads_triton(heads: Heads, known: Known) -> tuple[Tensor, AttentionState | None]:
    """(o, state)."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in heads):
        return record_heads(*heads, known), None
    options = known.options
    if not options.output_final_state:
        return replayed(known.plan, heads, lambda x: launches(turned(x, known.plan), known.fused, False, known).o), None
    x = turned(heads, known.plan)
    inputs = HybridInputs(q=x.q, k=x.k, v=x.v, fq=x.fq, fk=x.fk, g=x.g, merge_bias=x.weight)
    return chunk_hybrid_triton(inputs, options, known)


def turned(heads: Heads, plan: Plan) -> FusedInputs:
    """What the kernels of ``hybrid_forward`` take."""
    q, k, v, query_map, key_map, cos, sin, g, bias = heads
    fq, fk = projection.launch_both(q, k, query_map, key_map, plan)
    q, k = rotary.launch_both(q, k, cos, sin, False, plan)
    return FusedInputs(q, k, v, fq, fk, g, bias, *NO_MORE)


class _Heads(torch.autograd.Function):
    """o of heads that need gradients, without a state."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        *tensors, known = given
        ctx.known, heads = known, Heads(*tensors)
        x = turned(heads, known.plan)
        o, _, _, gates, masses = launches(x, known.fused, False, known)
        ctx.save_for_backward(*heads[:2], *heads[3:7], *x[:7], o, gates, *masses)
        ctx.set_materialize_grads(False)
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_o is None:
            return (None,) * 10
        given = ctx.saved_tensors
        q, k, query_map, key_map, cos, sin, *saved = given
        x, o, gates, masses = FusedInputs(*saved[:7], *NO_MORE), saved[7], saved[8], Masses(*saved[9:])
        options, needed = ctx.known.fused, ctx.needs_input_grad
        again = torch.is_grad_enabled()  # create_graph=True: operators say that they have no second derivative
        if again:
            named = x._asdict() | options._asdict()
            del named["log_scale"]
            linear, window, spread, top_key = masses
            found = hybrid_backward(
                **named, o=o, gates=gates, linear=linear, log_window=window, spread=spread, top_key=top_key, d_o=d_o,
                d_s=None, d_z=None, gate_gradient=needed[7],
            )  # fmt: skip
        else:
            row = Found(o, gates, masses, d_o, None)
            plan = ctx.known.plan_of_gradients(d_o, given, needed)
            found = gradients(x, options, row, *ctx.known.described(x), needed[7], None, any(needed[:3]), plan)
        dq, dk, dv, dfq, dfk, dg, d_weight = found[:7]
        if again:
            dq, dk = rotary.turn(dq, cos, sin, True), rotary.turn(dk, cos, sin, True)
        elif needed[0] or needed[1]:
            dq, dk = rotary.launch_both(dq, dk, cos, sin, True, plan)
        if needed[0] and needed[1] and needed[3] and needed[4] and not again:
            d_query_map, d_key_map = projection.gradients_of_both(q, k, query_map, key_map, dfq, dfk, dq, dk)
        else:
            dq, d_query_map = of_projection(q, query_map, dq, dfq, needed[0], needed[3])
            dk, d_key_map = of_projection(k, key_map, dk, dfk, needed[1], needed[4])
        rest = (None if x.g is None or not needed[7] else dg, d_weight if needed[8] else None)
        return dq, dk, dv if needed[2] else None, d_query_map, d_key_map, None, None, *rest, None


record_heads = recorded(_Heads)


def of_projection(
    x: Tensor, weight: Tensor, d_x: Tensor, dy: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, that of x written over d_x, unless somebody differentiates it."""
    if torch.is_grad_enabled():
        dx, d_weight = projection.project_backward(x, weight, dy, d_x, of_x, of_weight)
    elif of_x or of_weight:
        d_x = d_x if of_x else None
        dx, d_weight = d_x, projection.gradients(x, weight, dy, d_x, d_x, of_weight)
    else:
        return None, None
    return dx if of_x else None, d_weight if of_weight else None
