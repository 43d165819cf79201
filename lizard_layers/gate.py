"""Gates: from a layer's input to the log-decay of its linear branch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_layers.config import AttentionConfig
from lizard_layers.parameters import Float32Module, float32_parameter, full_precision


def start_logit(gate_init: float | None, temperature: float) -> float:
    """The bias b with sigmoid(b)**(1/temperature) = gate_init; 0 for None."""
    if gate_init is None:
        return 0.0
    inner = gate_init**temperature
    return math.log(inner) - math.log1p(-inner)


class SigmoidGate(Float32Module):
    """Scalar gates g = log sigmoid(x w + b) / temperature: one for all heads, or one per key head.

    x [B, T, d] -> g [B, T, width], float32. w starts from zero, so that the start is gate_init at every token.
    """

    def __init__(self, hidden_size: int, width: int, gate_init: float | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.start, self.temperature = start_logit(gate_init, temperature), temperature
        self.weight = float32_parameter(width, hidden_size)
        self.bias = float32_parameter(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.zero_()
            self.bias.fill_(self.start)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        g = F.logsigmoid(F.linear(full_precision(x), self.weight, self.bias))
        return g if self.temperature == 1 else g / self.temperature


class ChannelGate(Float32Module):
    """A gate per feature through a bottleneck, as in GLA (arXiv 2312.06635).

    g = log sigmoid(x W1 W2 + b) / temperature; x [B, T, d] -> g [B, T, H, F], float32. W2 starts from zero, W1 from a
    normal of variance 1/d.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_features: int,
        rank: int = 16,
        gate_init: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.start, self.temperature = start_logit(gate_init, temperature), temperature
        self.down = float32_parameter(rank, hidden_size)
        self.up = float32_parameter(num_heads * num_features, rank)
        self.bias = float32_parameter(num_heads * num_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.down.normal_(std=self.down.shape[1] ** -0.5)
            self.up.zero_()
            self.bias.fill_(self.start)

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        logits = F.linear(F.linear(full_precision(x), self.down), self.up, self.bias)
        return F.logsigmoid(logits).unflatten(-1, (self.num_heads, -1)) / self.temperature


class Mamba2Gate(Float32Module):
    """Decay as in Mamba-2 (arXiv 2405.21060): g = -exp(A) softplus(x w + b), one per key head.

    x [B, T, d] -> g [B, T, H], float32. A and w start from zero; b so that the start is gate_init.
    """

    def __init__(self, hidden_size: int, num_heads: int, gate_init: float | None = None) -> None:
        super().__init__()
        self.start = 0.0 if gate_init is None else math.log(math.expm1(-math.log(gate_init)))
        self.weight = float32_parameter(num_heads, hidden_size)
        self.bias = float32_parameter(num_heads)
        self.log_rate = float32_parameter(num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.zero_()
            self.bias.fill_(self.start)
            self.log_rate.zero_()

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return -self.log_rate.exp() * F.softplus(F.linear(full_precision(x), self.weight, self.bias))


class PoolingGate(Float32Module):
    """A gate without parameters, after Liger (arXiv 2503.01496): g = log sigmoid(mean_d k_d + b) / temperature.

    k [B, T, H, D] before RoPE -> g [B, T, H], float32. The mean runs over the channels of each key head (in Liger's
    released code the pooled width equals the input's, so that nothing is pooled); b is a constant set by gate_init.
    """

    def __init__(self, gate_init: float | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.start, self.temperature = start_logit(gate_init, temperature), temperature

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return F.logsigmoid(full_precision(k).mean(-1) + self.start) / self.temperature


def build_gate(config: AttentionConfig) -> SigmoidGate | ChannelGate | Mamba2Gate | PoolingGate | None:
    """The gate that ``config`` names; forward(x [B, T, d], k [B, T, Hk, D]) -> log-decay. None for no decay."""
    widths = {"scalar": 1, "key_head": config.num_key_heads}
    if config.gate in widths:
        return SigmoidGate(config.hidden_size, widths[config.gate], config.gate_init, config.gate_temperature)
    if config.gate == "channel":
        return ChannelGate(
            config.hidden_size, config.linear_key_heads, config.num_features,
            config.gate_rank, config.gate_init, config.gate_temperature,
        )  # fmt: skip
    if config.gate == "mamba2":
        return Mamba2Gate(config.hidden_size, config.num_key_heads, config.gate_init)
    if config.gate == "pooling":
        return PoolingGate(config.gate_init, config.gate_temperature)
    return None
