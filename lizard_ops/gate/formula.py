"""Gate and merge bias as products of the layer's input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gate_and_bias_formula(
    x: Tensor, gate_weight: Tensor, gate_bias: Tensor, bias_weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """(g [B, T, G], m [B, T, H]) of x [B, T, D], all of one dtype."""
    g = F.logsigmoid(F.linear(x, gate_weight, gate_bias))
    return g if temperature == 1 else g / temperature, F.linear(x, bias_weight, bias)
