"""An op's call on a rank that holds a part of the sequence: the state that it begins with."""

from __future__ import annotations

from typing import Any

from lizard_ops.common.checks import want
from lizard_ops.common.padding import compact, compaction
from lizard_ops.common.rows import Inputs
from lizard_ops.common.state import AttentionState
from lizard_ops.context_parallel.exchange import over_ranks, process_group
from lizard_ops.context_parallel.incoming import incoming_state
from lizard_ops.context_parallel.part import Part, PartOptions


def checked_group(group: Any, inputs: Inputs) -> Any:
    """The ProcessGroup of ``context_group``; raises ValueError for what a call of several ranks leaves out."""
    found = process_group("context_group", group)
    state, ends, rows = inputs.initial_state, inputs.cu_seqlens, inputs.v.shape[1]
    want(state is None, "initial_state", type(state).__name__, "None with context_group: it is that of earlier ranks")
    want(ends is None, "cu_seqlens", ends, "None with context_group: a part is of one sequence a row")
    want(rows > 0, "v", inputs.v, "at least one position on every rank of context_group")
    return found


def state_before(part: Part, options: PartOptions, inputs: Inputs, group: Any) -> AttentionState:
    """The state after what earlier ranks hold, with padded places, for checked inputs of which ``part`` names the rows.

    part: its rows as the caller has them, with padding anywhere.
    """
    if inputs.padding_mask is not None:
        plan = compaction(inputs.padding_mask)
        part = Part(**{name: compact(x, plan) for name, x in part.rows().items()}, padded=plan.lengths)
    return over_ranks(incoming_state(part, options, group.rank()), group)
