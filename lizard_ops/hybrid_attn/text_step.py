"""The decode step of one text on a CPU from what a layer projects: the public function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.kinds import Kinds
from lizard_ops.common.places import Places
from lizard_ops.common.state import AttentionState
from lizard_ops.few_tokens.api import check_token_heads
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments
from lizard_ops.hybrid_attn.kept_text import KeptText, ScoreOf, kept_text_of
from lizard_ops.hybrid_attn.one_text import OneText, text_of, turned
from lizard_ops.key_score.arguments import KeyScoreState, ReceivedInputs, StepInputs, step_arguments

OF_OWN_DTYPE = ("position", "kept_scores", "kept_positions", "ring_scores")
_accepted = Kinds()
Pair = tuple[Tensor, Tensor]


def text_step(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Pair,
    rope: Pair,
    gate: Pair,
    merge: tuple[Tensor, Tensor | None],
    window: int,
    state: AttentionState,
    *,
    temperature: float = 1.0,
    anchors: int = 0,
    feature_map: str = "softmax",
    merge_mass: str = "relative",
    scale: float | None = None,
    softcap: float | None = None,
    feature_scale: float | None = None,
) -> Tensor:
    """``token_heads`` of a token and ``recurrent_hybrid_attn`` of what it forms, for one text on a CPU::

        g, merge_bias, q, k, fq, fk = token_heads(x, q, k, maps, rope, gate, merge, temperature=temperature)
        o = recurrent_hybrid_attn(
            q, k, v, fq, fk, g, window, mix="merge", coverage="outside", merge_bias=merge_bias, initial_state=state,
            output_final_state=True, inplace=True, ...
        )

    Their numbers but for the order of sums, in a third of their operators. Features of the queries are formed only once
    keys have left the window.

    Args:
        x: [1, 1, hidden] the layer's normalised input, float32 or float64, as all other tensors of numbers.
        q: [1, 1, Hq, D], k: [1, 1, Hk, D] and v: [1, 1, Hk, V] before RoPE.
        maps, rope, gate, merge, temperature: as for ``token_heads``, with a gate or one a key head.
        window, anchors, feature_map, merge_mass, scale, softcap, feature_scale: as for ``recurrent_hybrid_attn``, of
            the feature maps "identity" and "softmax".
        state: what that op leaves of one text; overwritten, its position included.

    Returns:
        o [1, 1, Hq, V].

    Raises:
        ValueError: as those ops, for tensors that are not on a CPU or of several dtypes, more than one token, and where
            gradients are recorded, in which the state from before would be needed.
    """
    given = (x, q, k, v, *maps, *rope, *gate, *merge)
    options = _options(window, anchors, feature_map, merge_mass, scale, softcap, feature_scale, q.shape[3])
    _accepted.check(given, (temperature, feature_map), lambda: _check(given, temperature, options))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*given, *state)):
        raise ValueError("state: got one to overwrite, wanted torch.no_grad(): gradients are recorded")
    text = text_of(state, options, lambda: _check_state(given, state, options))
    both = torch.cat([q, k], 2)[0, 0]
    turns = turned(both, rope[0][0], rope[1][0])
    o = _step(text, x.view(-1), both, turns, v[0, 0], maps, gate, merge, temperature)
    return o.view(1, 1, q.shape[2], -1)


class TextStep:
    """``text_step`` of one layer whose weights and choices stay: what does not change from token to token is checked
    once for each state, so that a caller of many small layers pays for the step alone.

    Args:
        maps, gate, merge, window and the options: as for ``text_step``.
    """

    def __init__(
        self,
        maps: Pair,
        gate: Pair,
        merge: tuple[Tensor, Tensor | None],
        window: int,
        *,
        temperature: float = 1.0,
        anchors: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
        feature_scale: float | None = None,
    ) -> None:
        self.maps, self.gate, self.merge, self.temperature = maps, gate, merge, temperature
        dim = maps[0].shape[1]
        self.options = _options(window, anchors, "softmax", "relative", scale, softcap, feature_scale, dim)

    def text(self, state: Any) -> OneText | None:
        """What steps on this state read and write; None for a state of another kind.

        Raises ValueError as ``text_step``, when a state comes for the first time.
        """
        if type(state) is not AttentionState or state.kept_k is not None:
            return None
        return text_of(state, self.options, lambda: self._check(state, _check_state))

    def __call__(self, text: OneText, row: Tensor, heads: Tensor, v: Tensor, turn: Tensor) -> Tensor:
        """o [Hk, Hq / Hk, V] of the next token, with the state of ``text`` overwritten. To be called where no gradient
        is recorded and nobody looks at operators; what is given is not checked.

        Args:
            text: of this step.
            row: [hidden] the layer's normalised input, of the dtype of the weights, as all of these.
            heads: [Hq + Hk, D], queries and behind them keys, before RoPE.
            v: [Hk, V].
            turn: [D, D] of ``turn_matrix``.
        """
        turned_heads = torch.mm(heads, turn)
        return _step(text, row, heads, turned_heads, v, self.maps, self.gate, self.merge, self.temperature)

    def _check(self, state: AttentionState, check_state: Callable[..., None]) -> None:
        """Raises as ``text_step``."""
        checks.want(state.ring_k is not None and state.ring_v is not None, "state", state, "one with a window")
        assert state.ring_k is not None and state.ring_v is not None
        (of_q, of_k), (gate, _), (merge, _) = self.maps, self.gate, self.merge
        x, dim = gate.new_zeros(1, 1, gate.shape[1]), of_q.shape[1]
        q, angle = x.new_zeros(1, 1, merge.shape[0], dim), x.new_zeros(1, 1, dim)
        k, v = (x.new_zeros(1, 1, ring.shape[2], ring.shape[3]) for ring in (state.ring_k, state.ring_v))
        given = (x, q, k, v, of_q, of_k, angle, angle, *self.gate, *self.merge)
        _check(given, self.temperature, self.options)
        check_state(given, state, self.options)


class KeptTextStep(TextStep):
    """``TextStep`` of a layer with coverage="left" that keeps keys by scores which read what keys receive: in place of

    ``recurrent_hybrid_attn`` without scores, ``key_score_step`` of the heads before RoPE with ``received``, and
    ``recurrent_hybrid_attn`` with what it gives, score_delay = window - 1 and coverage="left".

    Args:
        score: the scores' parameters, of the dtype of the other weights.
        kept_keys: as for ``recurrent_hybrid_attn``.
        others: as for ``TextStep``.
    """

    def __init__(
        self,
        maps: Pair,
        gate: Pair,
        merge: tuple[Tensor, Tensor | None],
        window: int,
        score: ScoreOf,
        kept_keys: Places,
        **others: Any,
    ) -> None:
        super().__init__(maps, gate, merge, window, **others)
        self.score = score
        self.options = self.options._replace(coverage="left", kept_keys=kept_keys, score_delay=window - 1)

    def text(self, state: Any, scored: tuple[Tensor, ...] | None = None) -> KeptText | None:
        """As ``TextStep``; scored: the state of the scores, or a tuple of its fields in their order. None, too, where
        places are not filled in their order."""
        if type(state) is not AttentionState or scored is None or state.kept_k is None or len(scored) < 5:
            return None
        given = state, KeyScoreState(*scored)
        return kept_text_of(*given, self.options, self.score.stride, lambda: self._check_both(*given))

    def __call__(self, text: OneText, row: Tensor, heads: Tensor, v: Tensor, turn: Tensor) -> Tensor:
        """As ``TextStep``, with both states overwritten."""
        assert isinstance(text, KeptText)
        position, sizes = int(text.position), [heads.shape[0] - v.shape[0], v.shape[0]]
        (of_q, of_k), (q, k) = heads.split(sizes), torch.mm(heads, turn).split(sizes)
        read = _read(row, of_q, of_k, self.maps, self.gate, self.merge, self.temperature, text.joins(position))
        return text.kept_step(position, (q, k, v), *read, of_k, torch.mv(self.score.inner_weight, row), self.score)

    def _check_both(self, state: AttentionState, scored: KeyScoreState) -> None:
        """Raises as the ops that it stands for."""
        self._check(state, functools.partial(_check_state, scored=True))
        assert state.ring_k is not None and state.ring_v is not None
        sums = self.score.inner_weight.new_zeros(1, 1, self.score.inner_weight.shape[0])
        k, v = (sums.new_zeros(1, 1, *ring.shape[2:]) for ring in (state.ring_k, state.ring_v))
        q = sums.new_zeros(1, 1, self.merge[0].shape[0], k.shape[3])
        received = ReceivedInputs(
            q, k, state.ring_k, state.anchor_k, self.score.term, self.score.stride, self.options.scale,
            self.options.softcap,
        )  # fmt: skip
        step_arguments(StepInputs(sums, k, v, self.score.weights, scored, received, None, True))
        checks.want(k.shape == v.shape, "state.ring_v", state.ring_v, "values as wide as keys")


def turn_matrix(cos: Tensor, sin: Tensor) -> Tensor:
    """[D, D] that turns heads: ``apply_rotary(x, cos, sin)`` is x @ turn, of angles [D]."""
    here, there = _places_of_turns(cos.shape[0], cos.dtype)
    return torch.addcmul(here * cos, there, sin)


@functools.cache
def _places_of_turns(dim: int, dtype: torch.dtype) -> Pair:
    """What cosines and what sines [D] are multiplied by in ``turn_matrix``."""
    with torch.inference_mode(False):
        here = torch.eye(dim, dtype=dtype)
        half = here.roll(dim // 2, 0)  # y_j reads x_{j + D/2} negated in the first half, x_{j - D/2} in the second
        half[:, : dim // 2] *= -1
        return here, half


def _step(
    text: OneText, row: Tensor, heads: Tensor, turned_heads: Tensor, v: Tensor, maps: Pair, gate: Pair,
    merge: tuple[Tensor, Tensor | None], temperature: float,
) -> Tensor:  # fmt: skip
    """o [Hk, G, V] of heads [Hq + Hk, D] as they came and turned."""
    position, sizes = int(text.position), [heads.shape[0] - v.shape[0], v.shape[0]]
    (of_q, of_k), (q, k) = heads.split(sizes), turned_heads.split(sizes)
    o = text.step(position, q, k, v, *_read(row, of_q, of_k, maps, gate, merge, temperature, text.joins(position)))
    text.position.add_(1)
    return o


def _read(
    row: Tensor, q: Tensor, k: Tensor, maps: Pair, gate: Pair, merge: tuple[Tensor, Tensor | None], temperature: float,
    joins: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(fq, fk, g, merge bias) of heads [H, D] before RoPE; the first and the last only where a key joins the sums."""
    bias = fq = None
    if joins:
        bias = torch.mv(merge[0], row) if merge[1] is None else torch.addmv(merge[1], merge[0], row)
        fq = _projected(q, maps[0])
    g = torch.nn.functional.logsigmoid(torch.addmv(gate[1], gate[0], row))
    return fq, _projected(k, maps[1]), g if temperature == 1 else g / temperature, bias


def _projected(x: Tensor, weight: Tensor) -> Tensor:
    """[H, F] of heads x [H, D] and their matrices [M, D, F]."""
    return torch.bmm(x.view(weight.shape[0], -1, x.shape[1]), weight).view(x.shape[0], -1)


@functools.lru_cache(maxsize=256)
def _options(
    window: int, anchors: int, feature_map: str, merge_mass: str, scale: float | None, softcap: float | None,
    feature_scale: float | None, dim: int,
) -> HybridOptions:  # fmt: skip
    """As ``hybrid_arguments`` leaves them."""
    return HybridOptions(
        window=window, anchors=anchors, feature_map=feature_map, merge_mass=merge_mass, mix="merge", coverage="outside",
        scale=dim**-0.5 if scale is None else scale, softcap=softcap, inplace=True, output_final_state=True,
        feature_scale=1.0 if feature_scale is None else feature_scale,
    )  # fmt: skip


def _check(given: tuple[Any, ...], temperature: float, options: HybridOptions) -> None:
    """Raises as ``text_step``, but for the state."""
    x, q, k, v, of_q, of_k, cos, sin, gate, of_gate, merge, of_merge = given
    check_token_heads(x, q, k, (of_q, of_k), (cos, sin), (gate, of_gate), (merge, of_merge), temperature)
    checks.want(x.shape[:2] == (1, 1) and x.device.type == "cpu", "x", x, "one token of one text on a CPU")
    checks.want(x.dtype in checks.GATE_FLOATS, "x", x, "float32 or float64")
    names = ("q", "k", "v", "maps", "maps", "rope", "rope", "gate", "gate", "merge", "merge")
    for name, t in zip(names, given[1:], strict=True):
        checks.want(t is None or t.dtype == x.dtype, name, t, "the dtype of x, {}", x.dtype)
    checks.want(gate.shape[0] in (1, k.shape[2]), "gate", gate, "one row, or one a key head")
    checks.check_choice("feature_map", options.feature_map, ("identity", "softmax"))


def _check_state(given: tuple[Any, ...], state: AttentionState, options: HybridOptions, scored: bool = False) -> None:
    """Raises for a state that is not one of such a call, as ``recurrent_hybrid_attn``; scored: with scores."""
    _, q, k, v, _, of_k, _, _, gate, *_ = given
    fq, fk = (t.new_zeros(*t.shape[:3], of_k.shape[2]) for t in (q, k))
    g = q.new_zeros(1, 1, gate.shape[0])
    scores = q.new_zeros(k.shape[:3]) if scored else None
    hybrid_arguments(HybridInputs(q=q, k=k, v=v, fq=fq, fk=fk, g=g, initial_state=state, scores=scores), options)
    for name, t in state._asdict().items():
        checks.want(t is None or t.is_contiguous(), f"initial_state.{name}", t, "a contiguous tensor")
        checks.want(t is None or name in OF_OWN_DTYPE or t.dtype == q.dtype, f"initial_state.{name}", t, str(q.dtype))
