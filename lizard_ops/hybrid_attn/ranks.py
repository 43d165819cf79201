"""The state with which a rank begins that holds a part of the sequence."""

from __future__ import annotations

from typing import Any

from lizard_ops.common import checks
from lizard_ops.common.state import AttentionState
from lizard_ops.context_parallel.call import checked_group, state_before
from lizard_ops.context_parallel.part import Part, PartOptions
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.places import listed_state


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
