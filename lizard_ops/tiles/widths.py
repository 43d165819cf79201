"""Tile widths."""

from __future__ import annotations

from lizard_ops.common.sizes import power_of_2


def power_of_two(dim: int, *beside: int) -> int:
    """Tile width for a dimension: a power of two that tensor cores take.

    Never 16 where a dimension ``beside`` it is over 64: products of such tiles read out of bounds (docs/kernels.md).
    """
    return max(32 if max(beside, default=0) > 64 else 16, power_of_2(dim))
