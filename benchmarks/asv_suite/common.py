"""Inputs for the suites: the head shapes of a 135M Llama, seeded, on one thread so that runs compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, KEY_HEADS, HEAD_DIM, PRE_FEATURES, WINDOW, ANCHORS = 9, 3, 64, 32, 128, 4


@dataclass
class Inputs:
    """q, k, v as a layer projects them; fq, fk pre-activations; phi_q, phi_k features; g log-decay a key head."""

    q: Tensor
    k: Tensor
    v: Tensor
    fq: Tensor
    fk: Tensor
    phi_q: Tensor
    phi_k: Tensor
    g: Tensor

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())


def two_sided_softmax(x: Tensor) -> Tensor:
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)


def make_inputs(length: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Inputs:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(1, length, heads, dim, generator=generator, dtype=torch.float64)

    q, k, v = normal(HEADS, HEAD_DIM), normal(KEY_HEADS, HEAD_DIM), normal(KEY_HEADS, HEAD_DIM)
    fq, fk = normal(HEADS, PRE_FEATURES), normal(KEY_HEADS, PRE_FEATURES)
    g = F.logsigmoid(normal(KEY_HEADS, 1).squeeze(-1) + 5.0)
    made = [x.to(dtype) for x in (q, k, v, fq, fk, two_sided_softmax(fq), two_sided_softmax(fk))]
    made.append(g.to(torch.float64 if dtype == torch.float64 else torch.float32))
    return Inputs(*(x.requires_grad_(requires_grad) for x in made))
