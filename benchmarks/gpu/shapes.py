"""The shape every kernel figure is measured at, and inputs of that shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 32768  # batch times length
LENGTHS = (2048, 8192, 32768)
HEADS, KEY_HEADS, HEAD_DIM, PRE_FEATURES = 32, 8, 128, 64
WINDOW, ANCHORS, SINKS = 128, 4, 4


@dataclass
class LayerInputs:
    """What one attention layer computes from: B = TOKENS / length rows, bfloat16, gates float32."""

    q: Tensor  # [B, T, HEADS, HEAD_DIM]
    k: Tensor  # [B, T, KEY_HEADS, HEAD_DIM]
    v: Tensor  # [B, T, KEY_HEADS, HEAD_DIM]
    q_map: Tensor  # [HEADS, HEAD_DIM, PRE_FEATURES] Hedgehog weight, float32
    k_map: Tensor  # [KEY_HEADS, HEAD_DIM, PRE_FEATURES] float32
    phi_q: Tensor  # [B, T, HEADS, 2 PRE_FEATURES] finished features
    phi_k: Tensor  # [B, T, KEY_HEADS, 2 PRE_FEATURES]
    g: Tensor  # [B, T, KEY_HEADS] log-decay
    g_channel: Tensor  # [B, T, KEY_HEADS, 2 PRE_FEATURES] log-decay
    sinks: Tensor  # [HEADS, SINKS]
    merge_bias: Tensor  # [B, T, HEADS]
    grad: Tensor  # [B, T, HEADS, HEAD_DIM] of the output


def two_sided_softmax(x: Tensor) -> Tensor:
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def pre_activations(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, H, D], weight [H, D, F] -> [B, T, H, F] in the dtype of x, as a user of PyTorch writes it."""
    return torch.einsum("bthd,hdf->bthf", x, weight.to(x.dtype))


def make_layer(length: int, device: str = "cuda", tokens: int = TOKENS, seed: int = 0) -> LayerInputs:
    generator = torch.Generator(device).manual_seed(seed)
    rows = max(1, tokens // length)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def heads(count: int, dim: int) -> Tensor:
        return normal(rows, length, count, dim)

    log_decay = F.logsigmoid(normal(rows, length, KEY_HEADS, dtype=torch.float32) + 5.0)
    log_decay_channel = F.logsigmoid(normal(rows, length, KEY_HEADS, 2 * PRE_FEATURES, dtype=torch.float32) + 5.0)
    made = LayerInputs(
        q=heads(HEADS, HEAD_DIM),
        k=heads(KEY_HEADS, HEAD_DIM),
        v=heads(KEY_HEADS, HEAD_DIM),
        q_map=normal(HEADS, HEAD_DIM, PRE_FEATURES, dtype=torch.float32) * HEAD_DIM**-0.5,
        k_map=normal(KEY_HEADS, HEAD_DIM, PRE_FEATURES, dtype=torch.float32) * HEAD_DIM**-0.5,
        phi_q=two_sided_softmax(heads(HEADS, PRE_FEATURES)),
        phi_k=two_sided_softmax(heads(KEY_HEADS, PRE_FEATURES)),
        g=log_decay,
        g_channel=log_decay_channel,
        sinks=normal(HEADS, SINKS, dtype=torch.float32),
        merge_bias=normal(rows, length, HEADS, dtype=torch.float32),
        grad=heads(HEADS, HEAD_DIM),
    )
    for name, tensor in vars(made).items():
        tensor.requires_grad_(name != "grad")
    return made
