"""How far the anchors have moved on, for positions past the teacher's context."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AnchorBlock(NamedTuple):
    """New positions whose queries see the anchors moved on by the same amount."""

    length: int  # new positions, padding included
    cos: Tensor  # [B or 1, 1, D] of the angles by which the anchors move on; 1 where they do not
    sin: Tensor  # the same
    moved: Tensor  # [B or 1] bool, False where the row has not reached position_limit
