"""The launches of ``hybrid_heads``, and its one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class Row(NamedTuple):
    """What a forward call leaves for its backward, and the gradient that comes in."""

    q: Tensor  # before RoPE, as those below
    k: Tensor
    query_map: Tensor
    key_map: Tensor
    cos: Tensor
    sin: Tensor
    v: Tensor
    g: Tensor | None
    merge_bias: Tensor | None
    turned_q: Tensor
    turned_k: Tensor
    fq: Tensor
    fk: Tensor
    o: Tensor
    gates: Tensor
    linear: Tensor  # this and the next three: ``Masses``
    window: Tensor
    spread: Tensor
    top_key: Tensor
    d_o: Tensor

    @property
    def inputs(self) -> FusedInputs:
        """What the kernels of ``hybrid_forward`` took."""
        return FusedInputs(
            self.turned_q, self.turned_k, self.v, self.fq, self.fk, self.g, self.merge_bias, *NO_MORE
        )  # fmt: skip


def hybrid_heads_triton(heads: Heads, known: Known) -> tuple[Tensor, AttentionState | None]:
    """(o, state)."""
    if torch.is_grad_enabled():
        for x in heads:
            if x is not None and x.requires_grad:
                return record_heads(*heads, known), None
    options = known.options
    if not options.output_final_state:
        return replayed(known.plan, heads, lambda x: launches(turned(x, known.plan), known.fused, False, known).o), None
    given = turned(heads, known.plan)
    inputs = HybridInputs(
        q=given.q, k=given.k, v=given.v, fq=given.fq, fk=given.fk, g=given.g, merge_bias=given.weight
    )  # fmt: skip
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

        def launched(heads: Heads) -> tuple[Tensor, ...]:
            x = turned(heads, known.recorded)
            o, _, _, gates, masses = launches(x, known.fused, False, known, known.recorded)
            return x.q, x.k, x.fq, x.fk, o, gates, *masses

        left = replayed(known.recorded, heads, launched)
        q, k, v, *maps_and_turns, g, bias = tensors
        ctx.save_for_backward(q, k, *maps_and_turns, v, g, bias, *left)
        ctx.set_materialize_grads(False)
        return left[4]

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_o is None:
            return (None,) * 10
        row, known, needed = Row(*ctx.saved_tensors, d_o), ctx.known, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: operators say that they have no second derivative
            return gradients_by_operators(row, known, needed)
        plan = known.plan_of_gradients(row, needed)
        return replayed(plan, row, lambda row: gradients_of(row, known, needed, plan))


def gradients_of(row: Row, known: Known, needed: Sequence[bool], plan: Plan) -> tuple[Tensor | None, ...]:
    """Those of the arguments of ``_Heads``, None for what is not needed."""
    x, options, cos, sin = row.inputs, known.fused, row.cos, row.sin
    masses = Masses(row.linear, row.window, row.spread, row.top_key)
    found = gradients(
        x, options, Found(row.o, row.gates, masses, row.d_o, None), *known.described(x), needed[7], None,
        any(needed[:3]), plan,
    )  # fmt: skip
    dq, dk, dv, dfq, dfk, dg, d_weight = found[:7]
    if needed[0] or needed[1]:
        dq, dk = rotary.launch_both(dq, dk, cos, sin, True, plan)
    if needed[0] and needed[1] and needed[3] and needed[4]:
        of_maps = projection.gradients_of_both(row.q, row.k, row.query_map, row.key_map, dfq, dfk, dq, dk, plan)
    else:
        of_queries = (row.q, row.query_map, dq, dfq, needed[0], needed[3])
        of_keys = (row.k, row.key_map, dk, dfk, needed[1], needed[4])
        dq, d_query_map = of_projection(*of_queries, plan, "queries")
        dk, d_key_map = of_projection(*of_keys, plan, "keys")
        of_maps = d_query_map, d_key_map
    rest = (None if x.g is None or not needed[7] else dg, d_weight if needed[8] else None)
    return dq, dk, dv if needed[2] else None, *of_maps, None, None, *rest, None


def gradients_by_operators(row: Row, known: Known, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """``gradients_of``, differentiable as far as operators are."""
    x, cos, sin = row.inputs, row.cos, row.sin
    named = x._asdict() | known.fused._asdict()
    del named["log_scale"]
    dq, dk, dv, dfq, dfk, dg, d_weight, *_ = hybrid_backward(
        **named, o=row.o, gates=row.gates, linear=row.linear, log_window=row.window, spread=row.spread,
        top_key=row.top_key, d_o=row.d_o, d_s=None, d_z=None, gate_gradient=needed[7],
    )  # fmt: skip
    dq, dk = rotary.turn(dq, cos, sin, True), rotary.turn(dk, cos, sin, True)
    dq, d_query_map = of_projection(row.q, row.query_map, dq, dfq, needed[0], needed[3])
    dk, d_key_map = of_projection(row.k, row.key_map, dk, dfk, needed[1], needed[4])
    rest = (None if x.g is None or not needed[7] else dg, d_weight if needed[8] else None)
    return dq, dk, dv if needed[2] else None, d_query_map, d_key_map, None, None, *rest, None


record_heads = recorded(_Heads)


def of_projection(
    x: Tensor, weight: Tensor, d_x: Tensor, dy: Tensor, of_x: bool, of_weight: bool, plan: Plan | None = None,
    name: str = "",
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x and weight, that of x written over d_x, unless somebody differentiates it. plan, name: as for
    ``projection.gradients``."""
    if torch.is_grad_enabled():
        dx, d_weight = projection.project_backward(x, weight, dy, d_x, of_x, of_weight)
    elif of_x or of_weight:
        d_x = d_x if of_x else None
        dx, d_weight = d_x, projection.gradients(x, weight, dy, d_x, d_x, of_weight, plan, name)
    else:
        return None, None
    return dx if of_x else None, d_weight if of_weight else None
