"""Meta memory: learned sink logits that take mass in the window and bring no value."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_layers.parameters import Float32Module, float32_parameter


class MetaMemory(Float32Module):
    """Sink logits t, [M] for the layer or [Hq, M] with a set per query head, for the denominator of the window branch.

    They start at ``init`` on average, ``spread`` apart: equal sinks would get equal gradients and stay one sink.
    """

    def __init__(self, num_sinks: int, num_heads: int | None = None, init: float = 0.0, spread: float = 1.0) -> None:
        super().__init__()
        self.init, self.spread = init, spread
        self.logits = float32_parameter(*([num_sinks] if num_heads is None else [num_heads, num_sinks]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            count = self.logits.shape[-1]
            steps = torch.arange(count, dtype=self.logits.dtype) - (count - 1) / 2
            self.logits.copy_((self.init + self.spread * steps).expand_as(self.logits))

    def forward(self) -> Tensor:
        return self.logits
