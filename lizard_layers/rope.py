"""Rotary position embedding in the layout [B, T, H, D]."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (d, d + D/2) of x by the angles of each position (arXiv 2104.09864, half-split layout).

    x [B, T, H, D]; cos, sin [B or 1, T, D]; the result has x's dtype.
    """
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # [B, T, 1, D]
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
