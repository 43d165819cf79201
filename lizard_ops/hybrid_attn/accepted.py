"""Checks of a call's shapes, made once for each kind of call: a step of a small model takes less time than they do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.direct import is_watched
from lizard_ops.common.features import feature_dim
from lizard_ops.common.pages import check_pool_values
from lizard_ops.common.state import AttentionState, map_fields
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments

MOST = 256  # kinds of calls that are remembered
_accepted: set[tuple[Any, ...]] = set()


def accepted_arguments(inputs: HybridInputs, options: HybridOptions) -> tuple[HybridInputs, HybridOptions]:
    """``hybrid_arguments``, without what shapes, dtypes and devices decide where a call like this one was accepted.

    Values (the signs of gates, positions) are looked at in every call, as there. Padding, packing, scores, expiries and
    weights that are numbers are always checked in full, and so is what a tracer or a mode sees.
    """
    kind = _kind(inputs, options)
    if kind is None:  # torch.compile must not look at the set: it would compile again where that has grown
        return hybrid_arguments(inputs, options)
    try:
        known = kind in _accepted
    except TypeError:  # an option that has no business being a list
        return hybrid_arguments(inputs, options)
    if not known:
        found = hybrid_arguments(inputs, options)
        if len(_accepted) >= MOST:
            _accepted.clear()
        _accepted.add(kind)
        return found
    return _normal(inputs, options)


def _kind(inputs: HybridInputs, options: HybridOptions) -> tuple[Any, ...] | None:
    """All that the checks of shapes read; None for calls that are checked in full."""
    rare = (inputs.cu_seqlens, inputs.padding_mask, inputs.expiry, inputs.scores, inputs.kept_rows, inputs.has_state)
    if any(x is not None for x in rare) or is_watched():
        return None
    state = inputs.initial_state
    if state is not None and type(state) is not AttentionState:
        return None
    indices = inputs.state_indices
    tensors = (*inputs[:9], *(state or ()), indices)
    if any(x is not None and not isinstance(x, Tensor) for x in tensors):
        return None
    facts = tuple(None if x is None else (x.shape, x.dtype, x.device) for x in tensors)
    strides = None if indices is None or state is None else tuple(None if x is None else x.stride() for x in state)
    return facts, strides, options, tuple(map(type, options))  # True is no 1


def _normal(inputs: HybridInputs, options: HybridOptions) -> tuple[HybridInputs, HybridOptions]:
    """What ``hybrid_arguments`` returns for a call whose shapes it has accepted, with the values looked at again."""
    q, fk, g, state = inputs.q, inputs.fk, inputs.g, inputs.initial_state
    features = feature_dim(fk.shape[3], options.feature_map)
    if g is not None:
        checks.check_gate_values(g, None)
        g = (g.unsqueeze(-1) if g.ndim == 2 else g).to(checks.work_dtype(q))
    if state is not None and inputs.state_indices is not None:
        check_pool_values(state, inputs.state_indices, None)
    elif state is not None:
        checks.check_position_values(state)
        state = state if options.inplace else map_fields(Tensor.contiguous, state)
    sinks, alpha = inputs.sinks, inputs.alpha
    inputs = inputs._replace(
        g=g,
        sinks=sinks.expand(q.shape[2], -1) if sinks is not None and sinks.ndim == 1 else sinks,
        alpha=alpha.expand(q.shape[2]) if alpha is not None and alpha.ndim == 0 else alpha,
        initial_state=state,
    )
    default = 1.0 if options.normalize else features**-0.5
    return inputs, options._replace(
        scale=q.shape[3] ** -0.5 if options.scale is None else float(options.scale),
        feature_scale=default if options.feature_scale is None else float(options.feature_scale),
    )
