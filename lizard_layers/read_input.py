"""What the parts of a layer read from its input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lizard_layers.gate import SigmoidGate
from lizard_layers.mix import MergeMix
from lizard_layers.parameters import full_precision, has_hooks
from lizard_ops import gate_and_bias, token_heads

if TYPE_CHECKING:
    from lizard_layers.hybrid_attention import HybridAttention

Read = tuple[Tensor, Tensor | None, dict[str, Tensor | float | None]]
Heads = tuple[Tensor, Tensor, Tensor, Tensor]  # (q, k, fq, fk) as the op takes them


def read_input(layer: HybridAttention, x: Tensor, k: Tensor) -> Read:
    """(x for the scores, log-decays or None, arguments of the mix) of a layer's input x [B, T, hidden] and its keys."""
    gate, mix, impl = layer.gate, layer.mix, layer.config.impl
    if (weights := _weights(gate, mix)) is not None:
        assert isinstance(gate, SigmoidGate)
        of_gate, of_merge = weights
        g, bias = gate_and_bias(
            x, *of_gate, *of_merge, temperature=gate.temperature, impl=impl if impl in ("torch", "naive") else "auto"
        )
        return x if layer.key_score is None else full_precision(x), g, {"merge_bias": bias}
    if layer.reads_input:
        x = full_precision(x)  # once for all that read it
    return x, None if gate is None else gate(x, k), mix(x)


def read_token(
    layer: HybridAttention, x: Tensor, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor] | None
) -> tuple[Read, Heads] | None:
    """What ``read_input`` and ``HybridAttention.op_inputs`` make of one token a row, in one launch on a GPU; None where
    a part of the layer is another, or one launch cannot be."""
    if rope is None or not on_gpu(q) or torch.is_grad_enabled():
        return None
    config, maps, gate = layer.config, layer.feature_maps, layer.gate
    fits = config.window_rope and not config.linear_rope and not maps.one_sided
    if not fits or config.linear_key_heads != k.shape[2] or config.impl in ("torch", "naive") or has_hooks(maps):
        return None
    of_maps, weights = maps.weights(), _weights(gate, layer.mix)
    if of_maps is None or weights is None or not isinstance(gate, SigmoidGate):
        return None
    found = token_heads(x, q, k, of_maps, rope, *weights, temperature=gate.temperature)
    read = x if layer.key_score is None else full_precision(x)
    return (read, found.g, {"merge_bias": found.merge_bias}), (found.q, found.k, found.fq, found.fk)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _weights(
    gate: nn.Module | None, mix: nn.Module
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None:
    """Weight and bias of the gate and of the merge bias; None where those are others, or somebody sees them called."""
    if not isinstance(gate, SigmoidGate) or not isinstance(mix, MergeMix) or has_hooks(gate) or has_hooks(mix):
        return None
    of_mix = mix._parameters  # a Module's own look-up of an attribute is a function of Python
    if (weight := of_mix.get("weight")) is None:
        return None
    of_gate = gate._parameters
    return (of_gate["weight"], of_gate["bias"]), (weight, of_mix.get("bias"))  # type: ignore[return-value]
