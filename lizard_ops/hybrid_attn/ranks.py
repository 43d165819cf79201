"""The state with which a rank begins that holds a part of the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import autocast_inputs, without_autocast
from lizard_ops.common.state import AttentionState
from lizard_ops.context_parallel.call import checked_group, state_before
from lizard_ops.context_parallel.part import Part, PartOptions
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments
from lizard_ops.hybrid_attn.places import listed_state
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions, window_arguments


def state_of_earlier_ranks(inputs: HybridInputs, options: HybridOptions, context_group: Any) -> AttentionState:
    """That of checked arguments, as a call takes it. Raises ValueError for what a call of several ranks leaves out."""
    group = checked_group(context_group, inputs)
    checks.want(inputs.expiry is None, "expiry", inputs.expiry, "None with context_group; scores decide over ranks")
    scored = inputs.scores is not None
    part = Part(inputs.v, inputs.k, inputs.fk, inputs.g, inputs.scores)
    choices = PartOptions(
        window=options.window,
        offset=options.offset,
        anchors=options.anchors,
        feature_map=options.feature_map,
        places=options.kept_keys if scored else 0,
        score_delay=options.score_delay,
        late=scored and options.late,
    )
    state = state_before(part, choices, inputs, group)
    if isinstance(choices.places, tuple):
        return listed_state(state, choices.places, inputs.v.shape[2])
    return state


def context_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    g: Tensor | None,
    window: int,
    *,
    context_group: Any,
    anchors: int = 0,
    coverage: str = "all",
    feature_map: str = "identity",
    padding_mask: Tensor | None = None,
    scores: Tensor | None = None,
    score_delay: int = 0,
    kept_keys: int | Sequence[int] | None = None,
) -> AttentionState:
    """The state that the ranks before this one leave: what ``chunk_hybrid_attn`` begins with on its part of a sequence.

    ``chunk_hybrid_attn(..., context_group=group)`` is this and the same call with the result for ``initial_state``, and
    so may be several calls on pieces of the part. The arguments are as there; fq and fk None for a window branch alone
    (``window_attn``). Differentiable. The messages, and so the order among ranks, are those of the op.
    """
    if fq is None or fk is None:
        checks.want(fq is fk, "fq", fq, "None where fk is None, and a tensor where that is one")
        q, k, v = autocast_inputs(q, k, v)
        alone, _ = window_arguments(WindowInputs(q, k, v, padding_mask=padding_mask), WindowOptions(window, anchors))
        with without_autocast(q):
            group = checked_group(context_group, alone)
            return state_before(Part(alone.v, alone.k), PartOptions(window=window, anchors=anchors), alone, group)
    q, k, v, fq, fk = autocast_inputs(q, k, v, fq, fk)
    inputs, options = hybrid_arguments(
        HybridInputs(q=q, k=k, v=v, fq=fq, fk=fk, g=g, padding_mask=padding_mask, scores=scores),
        HybridOptions(
            window=window, anchors=anchors, coverage=coverage, feature_map=feature_map, kept_keys=kept_keys,
            score_delay=score_delay,
        ),
    )  # fmt: skip
    with without_autocast(q):
        return state_of_earlier_ranks(inputs, options, context_group)
