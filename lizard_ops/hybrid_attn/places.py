"""States whose heads keep different numbers of keys, between calls and the forms that work on padded places."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lizard_ops.common.places import Places, listed, padded
from lizard_ops.common.state import EMPTY_VALUES, AttentionState
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions

Form = Callable[[HybridInputs, HybridOptions], tuple[Tensor, AttentionState | None]]
PLACED = ("kept_k", "kept_v", "kept_fk", "kept_g", "kept_scores", "kept_positions")


def on_padded_places(form: Form, inputs: HybridInputs, options: HybridOptions) -> tuple[Tensor, AttentionState | None]:
    """(o, state) of a form that takes and leaves places padded to those of the head that has most."""
    places: Places = options.kept_keys
    if not isinstance(places, tuple):
        return form(inputs, options)
    heads = inputs.v.shape[2]
    o, state = form(inputs._replace(initial_state=padded_state(inputs.initial_state, places, inputs.g)), options)
    return o, None if state is None else listed_state(state, places, heads)


def padded_state(state: AttentionState | None, places: tuple[int, ...], g: Tensor | None) -> AttentionState | None:
    """A state with its places as a call of equal heads has them; g as ``check_gate`` returns it."""
    if state is None:
        return None
    fields = {name: getattr(state, name) for name in PLACED}
    wide = {n: padded(x, places, EMPTY_VALUES.get(n, 0)) for n, x in fields.items() if x is not None}
    if "kept_g" in wide and g is not None and g.ndim == 3 and wide["kept_g"].ndim == 4:  # of the query heads of a head
        wide["kept_g"] = wide["kept_g"].flatten(2, 3)
    return state._replace(**wide)


def listed_state(state: AttentionState, places: tuple[int, ...], heads: int) -> AttentionState:
    """The inverse of ``padded_state``."""
    fields = {name: getattr(state, name) for name in PLACED}
    if fields["kept_g"] is not None and fields["kept_g"].shape[2] > heads:
        fields["kept_g"] = fields["kept_g"].unflatten(2, (heads, -1))
    return state._replace(**{name: listed(x, places) for name, x in fields.items() if x is not None})
