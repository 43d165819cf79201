"""What a layer makes of whole texts that nothing stands before: the shortest way to the op that has all its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lizard_layers.parameters import has_hooks
from lizard_layers.read_input import read_input
from lizard_ops import AttentionState, hybrid_heads, without_autocast

if TYPE_CHECKING:
    from lizard_layers.hybrid_attention import HybridAttention


def read_text(
    layer: HybridAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None, final: bool
) -> tuple[Tensor, AttentionState | None] | None:
    """(o, state if ``final``) without padding, packing and a state before; None for single tokens, and where
    ``hybrid_heads`` may not stand for the ops apart."""
    if rope is None or not layer.config.linear_branch or not layer.takes_heads or q.shape[1] == 1:
        return None
    maps = layer.feature_maps
    if layer.sinks is not None or has_hooks(maps) or (weights := maps.weights()) is None:
        return None
    with without_autocast(x):
        _, g, mixed = read_input(layer, x, k)
        choices = choices_of(layer, final)
        return hybrid_heads(q, k, v, *weights, *rope, g, layer.config.window, **(choices | mixed))


def choices_of(layer: HybridAttention, final: bool) -> dict[str, Any]:
    """What the op is told of a layer's choices, made once for each of its configs."""
    config = layer.config
    known: tuple[Any, dict[bool, dict[str, Any]]] = layer.__dict__.get("_choices_of_texts", (None, {}))
    if known[0] is not config:
        known = layer.__dict__["_choices_of_texts"] = (config, {})
    if final not in known[1]:
        known[1][final] = dict(
            mix=config.mix, coverage=config.coverage, feature_map=layer.feature_maps.op_feature_map,
            normalize=config.normalize, feature_scale=config.feature_scale, anchors=config.anchors,
            sink_form=config.sink_form, scale=config.scale, softcap=config.softcap, output_final_state=final,
            impl=config.impl, gate_form=config.gate_form,
        )  # fmt: skip
    return known[1][final]
