"""The constant-size state that every op takes and returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

State = TypeVar("State", bound=tuple)  # a NamedTuple of tensors, each with a row per sequence, or None


class AttentionState(NamedTuple):
    """What is left of a sequence once its tokens are gone.

    N sequences, W window, A anchors, P kept keys, Hk key heads, Hs state heads (the key heads, or the query
    heads with a gate per query head), D head dim, F features after expansion, Fp features as given
    (pre-activations), V value dim. A field that an op has no use for is None.

    The linear sums hold the keys that have *left* the last ``window_offset`` positions (0 for an op
    that covers every key), decayed up to the newest key they hold and no further. With
    p = ``position`` and e = p - 1 - window_offset, the newest key inside::

        exp(log_scale) s = sum_{A <= j <= e} exp(G_e - G_j) phi_k(k_j) v_j^T
        exp(log_scale) z = sum_{A <= j <= e} exp(G_e - G_j) phi_k(k_j)

    so gates still in the ring do not touch the sums, and a hard reset inside the window loses nothing.
    Ring slot ``t % W`` holds position t; slots never written are zero.

    With scores (``kept_keys`` P > 0) the best P keys that have left the window, anchors aside, stay exact: ``kept_k``
    to ``kept_positions``. The sums of coverage="outside" then hold the keys that have *expired*, which left the window
    and were displaced from a place or never had one, and they are decayed up to the newest token, position p - 1,
    without the lag of ``window_offset``::

        exp(log_scale) s = sum_{expired j} exp(G_{p-1} - G_j) phi_k(k_j) v_j^T        and z as above

    With coverage="left" they hold all keys that have left the window, kept or not, and ``kept_fk`` and ``kept_g`` are
    None. ``log_scale`` is there with every feature map, unless coverage="all", since a key that stayed long may have
    decayed by more than a float holds; it is -inf before the first key has expired and after a reset that left none. An
    op leaves kept keys in the order of their positions, empty places last, and takes them in any order: a decode step
    overwrites the place of the key that it displaces. Empty places are zero but for their score and position. Where
    heads have different numbers of places, P is their sum and Hk falls away: ``kept_k`` is [N, P, D], head 0 first, and
    the others too; ``kept_g`` is [N, P], [N, P, Hq / Hk] with a gate per query head, or [N, P, F].

    An op refuses a state that has a field too many, lacks one, or has one of another shape, as other values of
    ``window``, ``coverage``, ``window_offset``, ``feature_map="exp"``, the hybrid's and the window's ``anchors``,
    ``kept_keys``, ``score_delay``, the number of features or of gates leave it. What leaves no trace in these tensors
    cannot be told, and the caller must keep it the same: the maps "identity" and "softmax" with as many features,
    ``anchors`` of the gated op alone, a gate or none without an offset, ``scale``, ``softcap``, sinks, ``mix`` and
    ``normalize`` (the last five may differ from call to call: the sums do not depend on them).
    """

    position: Tensor  # [N] int64, tokens seen
    s: Tensor | None = None  # [N, Hs, F, V] float32 (float64 for float64 inputs)
    z: Tensor | None = None  # [N, Hs, F] like s
    log_scale: Tensor | None = None  # [N, Hs] like s, running maximum; None (zero) unless feature_map="exp" or kept
    ring_k: Tensor | None = None  # [N, W, Hk, D] window keys
    ring_v: Tensor | None = None  # [N, W, Hk, V] window values
    ring_fk: Tensor | None = None  # [N, W, Hk, Fp] key features, as given, not yet in s
    ring_g: Tensor | None = None  # [N, W, Hg] or [N, W, Hk, F] log-decays, float32
    anchor_k: Tensor | None = None  # [N, A, Hk, D] the first A keys
    anchor_v: Tensor | None = None  # [N, A, Hk, V] the first A values
    kept_k: Tensor | None = None  # [N, P, Hk, D] keys that stay exact beyond window and anchors
    kept_v: Tensor | None = None  # [N, P, Hk, V] their values
    kept_fk: Tensor | None = None  # [N, P, Hk, Fp] their features, as given; coverage="outside" alone
    kept_g: Tensor | None = (
        None  # [N, P, Hk or Hq] or [N, P, Hk, F] like s, sum of g over (j, p - 1], -inf after a reset; the same
    )
    kept_scores: Tensor | None = None  # [N, P, Hk] float32, -inf in empty places
    kept_positions: Tensor | None = None  # [N, P, Hk] int64, -1 in empty places
    ring_scores: Tensor | None = None  # [N, W - score_delay, Hk] float32; slot t % (W - score_delay): what came with t


EMPTY_VALUES = {
    "log_scale": -math.inf,
    "kept_scores": -math.inf,
    "kept_positions": -1,
}  # fields that do not begin as zeros


def overwrite_state(state: AttentionState, new: AttentionState) -> AttentionState:
    """``state`` with the values of ``new``, which holds the same fields, in the memory and dtypes it has."""
    values = new._asdict()
    for name, kept in state._asdict().items():
        value = values[name]
        if kept is not None and value is not None and kept is not value:
            kept.copy_(value)
    return state


def map_fields(function: Callable[..., Tensor], *states: State) -> State:
    """``function`` of each field, with the same field of every state; None where one of them has none."""
    kind: Any = type(states[0])
    fields: dict[str, Any] = {}
    for name in kind._fields:
        values = [getattr(state, name) for state in states]
        fields[name] = None if any(x is None for x in values) else function(*values)
    return kind(**fields)
