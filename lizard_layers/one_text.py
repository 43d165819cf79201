"""A layer's step of one text on a CPU, in one op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lizard_layers import read_input
from lizard_layers.gate import SigmoidGate
from lizard_layers.key_score import ReceivingState
from lizard_layers.parameters import has_hooks
from lizard_layers.read_input import gate_and_mix
from lizard_layers.state import LayerState
from lizard_ops import (
    AttentionState,
    KeptTextStep,
    KeyScoreWeights,
    ScoreOf,
    TextStep,
    nobody_looks,
    text_step,
    turn_matrix,
)

if TYPE_CHECKING:
    from lizard_layers.hybrid_attention import HybridAttention


def takes_text_step(layer: HybridAttention) -> bool:
    """Whether the choices of a layer are those that ``text_step`` computes, or ``KeptTextStep`` with kept keys."""
    config = layer.config
    if not config.linear_branch or config.num_sinks or config.impl not in ("auto", "torch"):
        return False
    coverage = "left" if config.kept_keys else "outside"
    if config.kept_keys and not config.score_received:
        return False
    of_heads = config.linear_key_heads == config.num_key_heads and config.window_rope and not config.linear_rope
    merges = config.mix == "merge" and config.coverage == coverage and layer.feature_maps.op_feature_map == "softmax"
    return of_heads and merges and gate_and_mix(layer.gate, layer.mix) is not None


def step_of_one_text(
    layer: HybridAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None, state: Any
) -> Tensor | None:
    """o [1, 1, Hq, D] with the state overwritten; None where it is not one text's, is on another device, or somebody
    looks at what the parts compute."""
    if x.shape[:2] != (1, 1) or x.device.type != "cpu" or read_input.on_gpu(x) or torch.is_grad_enabled():
        return None
    if rope is None or not nobody_looks(x, q, k, v) or torch.is_autocast_enabled("cpu"):
        return None
    maps, gate, config = layer.feature_maps, layer.gate, layer.config
    weights, read = maps.weights(), gate_and_mix(gate, layer.mix)
    if weights is None or read is None or has_hooks(maps) or not isinstance(gate, SigmoidGate):
        return None
    held = state.attention if type(state) is LayerState else state
    if type(held) is not AttentionState:
        return None
    dtype = weights[0].dtype
    if any(t is None or t.dtype != dtype for t in (x, q, *rope, read[0][0], held.s, held.ring_k)):
        return None
    if layer.key_score is not None:
        return _kept_step_of_one_text(layer, x, q, k, v, rope, state)
    return text_step(
        x, q, k, v, weights, rope, *read, config.window, state, temperature=gate.temperature, anchors=config.anchors,
        scale=config.scale, softcap=config.softcap, feature_scale=config.feature_scale,
    )  # fmt: skip


def _kept_step_of_one_text(
    layer: HybridAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], state: LayerState
) -> Tensor | None:
    step = text_step_of(layer)
    text = None if step is None or any(has_hooks(m) for m in layer.modules() if m is not layer) else step.text(state)
    if step is None or text is None:
        return None
    turn = turn_matrix(rope[0].view(-1), rope[1].view(-1))
    return step(text, x.view(-1), torch.cat([q, k], 2)[0, 0], v[0, 0], turn).view(1, 1, q.shape[2], -1)


class _KeptLayerStep(KeptTextStep):
    """``KeptTextStep`` on a layer's own state."""

    def text(self, state: Any, scored: tuple[Tensor, ...] | None = None) -> Any:
        """As ``KeptTextStep``, of a ``LayerState``."""
        if type(state) is not LayerState or type(state.score) is not ReceivingState:
            return None
        return super().text(state.attention, state.score)


def text_step_of(layer: HybridAttention) -> TextStep | None:
    """The layer's step of one text as its weights are now, for a caller who sees to it that they stay, that no gradient
    is recorded, and that nobody looks; None where the layer has no such step."""
    if not layer.steps_at_once:
        return None
    maps, gate, config, score = layer.feature_maps, layer.gate, layer.config, layer.key_score
    weights, read = maps.weights(), gate_and_mix(gate, layer.mix)
    if weights is None or read is None or not isinstance(gate, SigmoidGate):
        return None
    options: dict[str, Any] = dict(
        temperature=gate.temperature, anchors=config.anchors, scale=config.scale, softcap=config.softcap,
        feature_scale=config.feature_scale,
    )  # fmt: skip
    if score is None:
        return TextStep(weights, *read, config.window, **options)
    if score.received is None or score.window_form is None or score.inner_weight.dtype != weights[0].dtype:
        return None
    of_score = ScoreOf(
        score.inner_weight.detach().flatten(0, 1),
        KeyScoreWeights(score.inner_bias, score.outer_weight, score.linear_weight, score.bias),
        score.received.weights(),
        score.window_form.stride,
    )
    return _KeptLayerStep(weights, *read, config.window, of_score, config.places, **options)
