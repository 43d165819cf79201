"""What the parts of a layer read from its input."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lizard_layers.gate import SigmoidGate
from lizard_layers.mix import MergeMix
from lizard_layers.parameters import full_precision, has_hooks
from lizard_ops import gate_and_bias

if TYPE_CHECKING:
    from lizard_layers.hybrid_attention import HybridAttention

Read = tuple[Tensor, Tensor | None, dict[str, Tensor | float | None]]


def read_input(layer: HybridAttention, x: Tensor, k: Tensor) -> Read:
    """(x for the scores, log-decays or None, arguments of the mix) of a layer's input x [B, T, hidden] and its keys."""
    gate, mix, impl = layer.gate, layer.mix, layer.config.impl
    if isinstance(gate, SigmoidGate) and isinstance(mix, MergeMix) and mix.weight is not None:
        if not has_hooks(gate) and not has_hooks(mix):
            g, bias = gate_and_bias(
                x, gate.weight, gate.bias, mix.weight, mix.bias, temperature=gate.temperature,
                impl=impl if impl in ("torch", "naive") else "auto",
            )  # fmt: skip
            return x if layer.key_score is None else full_precision(x), g, {"merge_bias": bias}
    if layer.reads_input:
        x = full_precision(x)  # once for all that read it
    return x, None if gate is None else gate(x, k), mix(x)
