"""What a step of the scores takes and leaves, and the checks that every form of it needs first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.state import map_fields

LOOK_AHEAD = 2  # inputs after its key that a score reads
INPUTS = LOOK_AHEAD + 2
STATISTICS = 3  # log norm of the key, log norm of the value, likeness to the mean key
SUMS = 3  # of what a key receives: all of it, that of the last quarter of the window, the most
FACTS = STATISTICS + SUMS
RING = STATISTICS + 1 + SUMS
LEAST_NORM = 1e-6
LEAST_RECEIVED = 1e-7


class KeyScoreState(NamedTuple):
    """What is left of N sequences for the scores to come. With p = ``position``, keys p - 2 and p - 1 wait for inputs.

    S inner units, Hk key heads, D head dim, W window.
    """

    position: Tensor  # [N] int64, tokens seen
    inner: Tensor  # [N, 3, S], sums over the inputs seen so far of keys p - 2, p - 1 and p
    linear: Tensor  # [N, 2, Hk], linear terms of keys p - 2 and p - 1
    key_sum: Tensor  # [N, Hk, D] float64, sum of the keys seen, each of length one
    ring: Tensor | None = None  # [N, W, Hk, 7], of the key at position t in place t % W; with ``received`` alone


class KeyScoreWeights(NamedTuple):
    """Parameters of the score, all of the dtype of the sums."""

    inner_bias: Tensor  # b [S]
    outer_weight: Tensor  # u [Hk, S]
    linear_weight: Tensor  # a [Hk, 3]
    bias: Tensor  # c [Hk]


class ReceivedWeights(NamedTuple):
    """Parameters of the term of what a key received, U inner units a head, of the dtype of the sums."""

    mean: Tensor  # m [Hk, 6]
    deviation: Tensor  # d [Hk, 6]
    inner_weight: Tensor  # A [Hk, 6, U]
    inner_bias: Tensor  # [Hk, U]
    outer_weight: Tensor  # [Hk, U]


class ReceivedInputs(NamedTuple):
    """What a score that reads the attention in the window takes beside the others."""

    q: Tensor  # [N, 1, Hq, D], as the window branch sees it
    k: Tensor  # [N, 1, Hk, D], the same
    ring_k: Tensor  # [N, W, Hk, D] window keys before this token, position t in place t % W
    anchor_k: Tensor | None  # [N, A, Hk, D] the first A keys, or None
    weights: ReceivedWeights
    stride: int  # every stride-th query counts
    scale: float  # of q . k
    softcap: float | None = None


class StepInputs(NamedTuple):
    """The arguments of a step, checked."""

    sums: Tensor  # [N, 1, 4 S]
    k: Tensor  # [N, 1, Hk, D]
    v: Tensor  # [N, 1, Hk, V]
    weights: KeyScoreWeights
    state: KeyScoreState
    received: ReceivedInputs | None
    padding_mask: Tensor | None  # [N, 1]
    inplace: bool

    def tensors(self) -> list[Tensor]:
        """Every tensor through which a gradient may go."""
        received = () if self.received is None else self.received.weights
        given = (self.sums, self.k, self.v, *self.weights, *self.state, *received)
        return [t for t in given if t is not None]


def step_arguments(inputs: StepInputs) -> StepInputs:
    """The same; raises ValueError for what does not fit."""
    sums, k, v, weights, state, received, mask, inplace = inputs
    fits = isinstance(sums, Tensor) and sums.ndim == 3 and sums.dtype in checks.GATE_FLOATS
    fits = fits and sums.shape[1] == 1 and sums.shape[2] > 0 and sums.shape[2] % INPUTS == 0
    checks.want(fits, "sums", sums, "a float32 or float64 tensor [N, 1, 4 S] of one token a sequence")
    number, units = sums.shape[0], sums.shape[2] // INPUTS
    for name, x in (("k", k), ("v", v)):
        fits = isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] > 0 and x.shape[3] > 0
        checks.want(fits, name, x, "a floating tensor [N, 1, Hk, dim]")
    heads, dim = k.shape[2:]
    checks.check_tensor("k", k, (number, 1, heads, dim), sums, checks.FLOATS)
    checks.check_tensor("v", v, (number, 1, heads, v.shape[3]), sums, checks.FLOATS)
    _check_fields("weights", weights, ((units,), (heads, units), (heads, STATISTICS), (heads,)), sums)
    shapes: dict[str, tuple[int, ...]] = {
        "position": (number,),
        "inner": (number, LOOK_AHEAD + 1, units),
        "linear": (number, LOOK_AHEAD, heads),
        "key_sum": (number, heads, dim),
    }
    if received is not None:
        window = _check_received(received, sums, (heads, dim))
        shapes["ring"] = (number, window, heads, RING)
    else:
        checks.want(state.ring is None, "state.ring", state.ring, "None without received")
    own = {"position": torch.int64, "key_sum": torch.float64}
    for name, shape in shapes.items():
        field = getattr(state, name)
        checks.check_tensor(f"state.{name}", field, shape, sums, (own.get(name, sums.dtype),))
        if inplace and not field.is_contiguous():
            raise ValueError(f"state.{name}: got strides {field.stride()}, wanted contiguous with inplace")
    if mask is not None:
        checks.check_tensor("padding_mask", mask, (number, 1), sums, (torch.bool,))
    checks.check_flag("inplace", inplace)
    return inputs


def _check_received(received: ReceivedInputs, sums: Tensor, key: tuple[int, int]) -> int:
    """The window of what is received, whose tensors fit."""
    (number, _, _), (heads, dim) = sums.shape, key
    q, ring_k, anchor_k, weights = received.q, received.ring_k, received.anchor_k, received.weights
    for name, x in (("q", q), ("ring_k", ring_k)):
        fits = isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 0
        checks.want(fits, f"received.{name}", x, "a floating tensor of four axes")
    fits = q.shape[2] > 0 and q.shape[2] % heads == 0
    checks.want(fits, "received.q", q, f"a number of heads that is a multiple of the {heads} of k")
    window = ring_k.shape[1]
    checks.want(window > LOOK_AHEAD, "received.ring_k", ring_k, f"a window of at least {LOOK_AHEAD + 1} keys")
    checks.check_tensor("received.q", q, (number, 1, q.shape[2], dim), sums, checks.FLOATS)
    checks.check_tensor("received.k", received.k, (number, 1, heads, dim), sums, checks.FLOATS)
    checks.check_tensor("received.ring_k", ring_k, (number, window, heads, dim), sums, checks.FLOATS)
    if anchor_k is not None:
        fits = isinstance(anchor_k, Tensor) and anchor_k.ndim == 4
        checks.want(fits, "received.anchor_k", anchor_k, "a floating tensor [N, A, Hk, D] or None")
        shape = (number, anchor_k.shape[1], heads, dim)
        checks.check_tensor("received.anchor_k", anchor_k, shape, sums, (ring_k.dtype,))
    units = weights.inner_bias.shape[-1]
    of_each = (heads, FACTS)
    shapes = (of_each, of_each, (heads, FACTS, units), (heads, units), (heads, units))
    _check_fields("received.weights", weights, shapes, sums)
    checks.check_count("received.stride", received.stride, 1)
    checks.check_scale("received.scale", received.scale, 1.0)
    checks.check_softcap(received.softcap)
    return window


def _check_fields(name: str, fields: tuple, shapes: tuple[tuple[int, ...], ...], like: Tensor) -> None:
    for field, x, shape in zip(fields._fields, fields, shapes, strict=True):  # type: ignore[attr-defined]
        checks.check_tensor(f"{name}.{field}", x, shape, like, (like.dtype,))


def copied(state: KeyScoreState) -> KeyScoreState:
    """The state in other memory."""
    return map_fields(lambda x: x.clone(memory_format=torch.contiguous_format), state)
