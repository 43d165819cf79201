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
    position, row = int(state.position), x.view(-1)
    heads = k.shape[2]
    bias = fq = None
    if text.joins(position):
        bias = torch.mv(merge[0], row) if merge[1] is None else torch.addmv(merge[1], merge[0], row)
        fq = _projected(q, maps[0])
    fk = _projected(k, maps[1])
    g = torch.nn.functional.logsigmoid(torch.addmv(gate[1], gate[0], row))
    if temperature != 1:
        g = g / temperature
    both = turned(torch.cat([q, k], 2)[0, 0], rope[0][0], rope[1][0])
    o = text.step(position, both[:-heads], both[-heads:], v[0, 0], fq, fk, g, bias)
    state.position.add_(1)
    return o.view(1, 1, q.shape[2], -1)


def _projected(x: Tensor, weight: Tensor) -> Tensor:
    """[H, F] of heads x [1, 1, H, D] and their matrices [M, D, F]."""
    return torch.bmm(x.view(weight.shape[0], -1, x.shape[3]), weight).view(x.shape[2], -1)


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
