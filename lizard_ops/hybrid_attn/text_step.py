"""The decode step of one text on a CPU from what a layer projects: the public function."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.kinds import Kinds
from lizard_ops.common.state import AttentionState
from lizard_ops.few_tokens.api import check_token_heads
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments
from lizard_ops.hybrid_attn.one_text import text_of, turned

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
    o = _step(text, state, x.view(-1), both, turned(both, rope[0][0], rope[1][0]), v[0, 0], maps, gate, merge, temperature)
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
        dim: int,
        *,
        temperature: float = 1.0,
        anchors: int = 0,
        scale: float | None = None,
        softcap: float | None = None,
        feature_scale: float | None = None,
    ) -> None:
        self.maps, self.gate, self.merge, self.temperature = maps, gate, merge, temperature
        self.options = _options(window, anchors, "softmax", "relative", scale, softcap, feature_scale, dim)

    def takes(self, state: Any) -> bool:
        """Whether a state is of the kind that steps overwrite."""
        return type(state) is AttentionState

    def __call__(self, row: Tensor, heads: Tensor, v: Tensor, turn: Tensor, state: AttentionState) -> Tensor:
        """o [Hk, Hq / Hk, V] of the next token, with the state overwritten. To be called where no gradient is recorded
        and nobody looks at operators.

        Args:
            row: [hidden] the layer's normalised input.
            heads: [Hq + Hk, D], queries and behind them keys, before RoPE.
            v: [Hk, V].
            turn: [D, D] of ``turn_matrix``.
            state: as for ``text_step``.

        Raises ValueError as ``text_step``, when a state comes for the first time.
        """
        text = text_of(state, self.options, lambda: self._check(row, heads, v, turn, state))
        return _step(text, state, row, heads, torch.mm(heads, turn), v, self.maps, self.gate, self.merge, self.temperature)

    def _check(self, row: Tensor, heads: Tensor, v: Tensor, turn: Tensor, state: AttentionState) -> None:
        """Raises as ``text_step``."""
        q, k = heads[: -v.shape[0]][None, None], heads[-v.shape[0] :][None, None]
        angles = (turn[:1].unsqueeze(0),) * 2
        given = (row.view(1, 1, -1), q, k, v[None, None], *self.maps, *angles, *self.gate, *self.merge)
        _check(given, self.temperature, self.options)
        _check_state(given, state, self.options)


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
    text: OneText, state: AttentionState, row: Tensor, heads: Tensor, turned_heads: Tensor, v: Tensor, maps: Pair,
    gate: Pair, merge: tuple[Tensor, Tensor | None], temperature: float,
) -> Tensor:  # fmt: skip
    """o [Hk, G, V] of heads [Hq + Hk, D] as they came and turned."""
    position, count = int(state.position), v.shape[0]
    bias = fq = None
    of_q, of_k = heads.split([heads.shape[0] - count, count])
    if text.joins(position):
        bias = torch.mv(merge[0], row) if merge[1] is None else torch.addmv(merge[1], merge[0], row)
        fq = _projected(of_q, maps[0])
    fk = _projected(of_k, maps[1])
    g = torch.nn.functional.logsigmoid(torch.addmv(gate[1], gate[0], row))
    if temperature != 1:
        g = g / temperature
    q, k = turned_heads.split([heads.shape[0] - count, count])
    o = text.step(position, q, k, v, fq, fk, g, bias)
    state.position.add_(1)
    return o


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


def _check_state(given: tuple[Any, ...], state: AttentionState, options: HybridOptions) -> None:
    """Raises for a state that is not one of such a call, as ``recurrent_hybrid_attn``."""
    _, q, k, v, _, of_k, _, _, gate, *_ = given
    fq, fk = (t.new_zeros(*t.shape[:3], of_k.shape[2]) for t in (q, k))
    g = q.new_zeros(1, 1, gate.shape[0])
    hybrid_arguments(HybridInputs(q=q, k=k, v=v, fq=fq, fk=fk, g=g, initial_state=state), options)
    for name, t in state._asdict().items():
        checks.want(t is None or t.is_contiguous(), f"initial_state.{name}", t, "a contiguous tensor")
        checks.want(t is None or name == "position" or t.dtype == q.dtype, f"initial_state.{name}", t, str(q.dtype))
