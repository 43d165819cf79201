"""The norm of one row on a CPU, in the fewest operators."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def rms_norm_row(row: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """``rms_norm`` of row [D] with weight [D], both float32 on a CPU, but for the order of sums; nothing is checked, so
    that the caller of many small layers can have it in three operators."""
    scale = (torch.dot(row, row).item() / row.shape[0] + eps) ** -0.5
    if unit_offset:
        row = row * scale
        return torch.addcmul(row, row, weight)
    return torch.addcmul(_nothing(row.shape[0]), row, weight, value=scale)


@functools.cache
def _nothing(width: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(width)
