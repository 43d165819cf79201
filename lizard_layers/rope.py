"""Rotary position embedding in the layout [B, T, H, D]."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lizard_ops import turn_heads


class AnchorBlock(NamedTuple):
    """New positions whose queries see the anchors moved on by the same amount."""

    length: int  # new positions, padding included
    cos: Tensor  # [B or 1, 1, D] of the angles by which the anchors move on; 1 where they do not
    sin: Tensor  # the same
    moved: Tensor  # [B or 1] bool, False where the row has not reached position_limit


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (d, d + D/2) of x by the angles of each position (arXiv 2104.09864, half-split layout).

    x [B, T, H, D]; cos, sin [B or 1, T, D]; the result has x's dtype.
    """
    return turn_heads(x, cos, sin)
