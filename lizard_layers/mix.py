"""Mixes: the learned numbers that join the two branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_layers.config import AttentionConfig
from lizard_layers.parameters import Float32Module, float32_parameter, full_precision


class SumMix(Float32Module):
    """alpha of o = o_lin + alpha o_win: a constant, a learned scalar [] or a number per query head [Hq]."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.start = config.alpha_init
        self.alpha = None
        if config.alpha != "fixed":
            self.alpha = float32_parameter(*([] if config.alpha == "learned" else [config.num_heads]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.alpha is not None:
            with torch.no_grad():
                self.alpha.fill_(self.start)

    def forward(self, x: Tensor) -> dict[str, Tensor | float | None]:
        return {"alpha": self.start if self.alpha is None else self.alpha}


class MergeMix(Float32Module):
    """Bias of o = share o_lin + (1 - share) o_win, share = sigmoid(log mass_lin - log mass_win + b_h + u_h . x).

    x [B, T, d] -> merge_bias [Hq] or [B, T, Hq] in float32, or None. u starts from zero.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.start = config.merge_bias_init
        self.bias = float32_parameter(config.num_heads) if config.merge_bias != "none" else None
        self.weight = None
        if config.merge_bias == "head_and_token":
            self.weight = float32_parameter(config.num_heads, config.hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            if self.bias is not None:
                self.bias.fill_(self.start)
            if self.weight is not None:
                self.weight.zero_()

    def forward(self, x: Tensor) -> dict[str, Tensor | float | None]:
        if self.weight is None:
            return {"merge_bias": self.bias}
        return {"merge_bias": F.linear(full_precision(x), self.weight, self.bias)}
