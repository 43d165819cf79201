"""A layer's step of one text on a CPU, in one op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lizard_layers import read_input
from lizard_layers.gate import SigmoidGate
from lizard_layers.parameters import has_hooks
from lizard_layers.read_input import gate_and_mix
from lizard_ops import AttentionState, TextStep, nobody_looks, text_step

if TYPE_CHECKING:
    from lizard_layers.hybrid_attention import HybridAttention


def takes_text_step(layer: HybridAttention) -> bool:
    """Whether the choices of a layer are those that ``text_step`` computes."""
    config = layer.config
    if not config.linear_branch or config.kept_keys or config.num_sinks or config.impl not in ("auto", "torch"):
        return False
    of_heads = config.linear_key_heads == config.num_key_heads and config.window_rope and not config.linear_rope
    merges = config.mix == "merge" and config.coverage == "outside" and layer.feature_maps.op_feature_map == "softmax"
    return of_heads and merges and gate_and_mix(layer.gate, layer.mix) is not None


def step_of_one_text(
    layer: HybridAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None, state: Any
) -> Tensor | None:
    """o [1, 1, Hq, D] with the state overwritten; None where it is not one text's, is on another device, or somebody
    looks at what the parts compute."""
    if x.shape[:2] != (1, 1) or x.device.type != "cpu" or read_input.on_gpu(x) or torch.is_grad_enabled():
        return None
    if (
        rope is None
        or type(state) is not AttentionState
        or not nobody_looks(x, q, k, v)
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    maps, gate, config = layer.feature_maps, layer.gate, layer.config
    weights, read = maps.weights(), gate_and_mix(gate, layer.mix)
    if weights is None or read is None or has_hooks(maps) or not isinstance(gate, SigmoidGate):
        return None
    dtype = weights[0].dtype
    if any(t is None or t.dtype != dtype for t in (x, q, *rope, read[0][0], state.s, state.ring_k)):
        return None
    return text_step(
        x, q, k, v, weights, rope, *read, config.window, state, temperature=gate.temperature, anchors=config.anchors,
        scale=config.scale, softcap=config.softcap, feature_scale=config.feature_scale,
    )  # fmt: skip


def text_step_of(layer: HybridAttention) -> TextStep | None:
    """The layer's step of one text as its weights are now, for a caller who sees to it that they stay, that no gradient
    is recorded, and that nobody looks; None where the layer has no such step."""
    if not layer.steps_at_once:
        return None
    maps, gate, config = layer.feature_maps, layer.gate, layer.config
    weights, read = maps.weights(), gate_and_mix(gate, layer.mix)
    if weights is None or read is None or not isinstance(gate, SigmoidGate):
        return None
    return TextStep(
        weights, *read, config.window, config.head_dim, temperature=gate.temperature, anchors=config.anchors,
        scale=config.scale, softcap=config.softcap, feature_scale=config.feature_scale,
    )  # fmt: skip
