"""The inputs, options, state and results of ``key_expiry``, and what every form of it checks first."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.places import Places, checked_places, most
from lizard_ops.common.state import map_fields

NEVER = 2**62  # the expiry of a key that stays: later than every position, and a window can be added to it


class ExpiryState(NamedTuple):
    """What is left of a sequence of scores: enough to go on, of a size that does not depend on its length.

    N sequences, W window, P ``kept_keys``, Hk key heads. With p = ``position``, the kept keys are the best P of the
    keys that some query below p has seen leave the window, those at positions anchors <= j < p - W. Ring slot
    ``t % W`` holds the score of position t; slots never written are zero.

    An op leaves the kept keys in the order of their positions, empty places last; it takes them in any order. Where
    heads have different numbers of places P is the largest, and those beyond a head's own stay empty.
    """

    position: Tensor  # [N] int64, tokens seen
    kept_scores: Tensor  # [N, P, Hk] float32, -inf in empty places
    kept_positions: Tensor  # [N, P, Hk] int64, -1 in empty places
    ring_scores: Tensor  # [N, W, Hk] float32


class Expiries(NamedTuple):
    """What ``key_expiry`` returns."""

    expiry: Tensor  # [B, T, Hk] int64, of the keys of this call
    state: ExpiryState | None  # after the last token
    carried: Tensor | None  # [N, P + W, Hk] int64, of the keys in initial_state: its P places, then its W ring slots


class ExpiryInputs(NamedTuple):
    """The tensors of a call."""

    scores: Tensor  # [B, T, Hk], float32 once checked
    initial_state: ExpiryState | None = None
    cu_seqlens: Tensor | None = None  # [N + 1]
    padding_mask: Tensor | None = None  # [B, T]

    @property
    def q(self) -> Tensor:
        """The tensor that shows rows and lengths, as every op's inputs have one."""
        return self.scores

    def by_token(self) -> dict[str, Tensor | None]:
        """Those with a row per token."""
        return {"scores": self.scores}


class ExpiryOptions(NamedTuple):
    """The choices of a call."""

    window: int
    anchors: int
    kept_keys: Any  # a number or one per key head as given, ``Places`` once checked
    output_final_state: bool = False


class Left(NamedTuple):
    """What a form leaves of each sequence: the fields of the final state if asked for, and ``Expiries.carried``."""

    position: Tensor
    kept_scores: Tensor | None = None
    kept_positions: Tensor | None = None
    ring_scores: Tensor | None = None
    carried: Tensor | None = None
    kept_numbers: Tensor | None = None  # [N, P, Hk] of the kept keys, as ``stream`` numbers them, -1 in empty places

    @property
    def state(self) -> ExpiryState | None:
        """The final state, if it was asked for."""
        if self.kept_scores is None or self.kept_positions is None or self.ring_scores is None:
            return None
        return ExpiryState(self.position, self.kept_scores, self.kept_positions, self.ring_scores)


def expiry_arguments(inputs: ExpiryInputs, options: ExpiryOptions) -> tuple[ExpiryInputs, ExpiryOptions]:
    """Raise ValueError for what does not fit; return the scores as float32, cut off from their graph, and places."""
    scores, mask = inputs.scores, inputs.padding_mask
    fits = isinstance(scores, Tensor) and scores.ndim == 3 and scores.dtype in checks.FLOATS
    checks.want(fits, "scores", scores, "a floating tensor [B, T, Hk]")
    checks.want(scores.shape[0] > 0 and scores.shape[2] > 0, "scores", scores, "at least one row and head")
    checks.check_count("window", options.window, 1)
    checks.check_count("anchors", options.anchors, 0)
    options = options._replace(kept_keys=checked_places(options.kept_keys, scores.shape[2], 0))
    checks.check_flag("output_final_state", options.output_final_state)
    sequences, cu_seqlens, mask = checks.check_sequences(scores, inputs.cu_seqlens, mask, "scores")
    if checks.may_read(scores) and (mask is None or checks.has_values(mask)):
        real = scores.detach() if mask is None else scores.detach()[mask]
        unordered = int(real.isnan().sum())
        checks.want(not unordered, "scores", unordered, "scores that are not NaN (this many are)")
    state = checked_state(inputs.initial_state, scores, sequences, options)
    return ExpiryInputs(scores.detach().float(), state, cu_seqlens, mask), options


def checked_state(
    state: ExpiryState | None, scores: Tensor, sequences: int, options: ExpiryOptions
) -> ExpiryState | None:
    """The carried state, contiguous, of the shapes that these options leave."""
    if state is None:
        return None
    checks.want(isinstance(state, ExpiryState), "initial_state", type(state).__name__, "an ExpiryState or None")
    places = (sequences, most(options.kept_keys), scores.shape[2])
    ring = (sequences, options.window, scores.shape[2])
    checks.check_tensor("initial_state.position", state.position, (sequences,), scores, (torch.int64,))
    checks.check_tensor("initial_state.kept_scores", state.kept_scores, places, scores, (torch.float32,))
    checks.check_tensor("initial_state.kept_positions", state.kept_positions, places, scores, (torch.int64,))
    checks.check_tensor("initial_state.ring_scores", state.ring_scores, ring, scores, (torch.float32,))
    if checks.may_read(state.position):
        first = int(state.position.min())
        checks.want(first >= 0, "initial_state.position", first, "tokens seen, >= 0 (this is the smallest)")
    if checks.may_read(state.kept_positions):
        held = state.kept_positions
        inside = int(((held >= 0) & (held >= (state.position - options.window).view(-1, 1, 1))).sum())
        wanted = "keys that have left the window (this many have not)"
        checks.want(not inside, "initial_state.kept_positions", inside, wanted)
        check_fill(held, options.kept_keys)
    return map_fields(Tensor.contiguous, state)


def check_fill(held: Tensor, places: Places) -> None:
    """No head of positions [N, P, Hk] holds more keys than it has places."""
    if isinstance(places, tuple):
        more = [int((held[:, :, h] >= 0).sum(1).max()) > count for h, count in enumerate(places)]
        checks.want(not any(more), "initial_state.kept_positions", held, f"at most {list(places)} keys in a key head")
