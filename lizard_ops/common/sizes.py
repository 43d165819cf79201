"""Sizes that torch.export leaves open, so that one program serves every length and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7 has it


def is_known(size: int) -> bool:
    """Whether a size is a number, rather than one that an export leaves open.

    Code that would ask an open size how it compares, or loop as often, would make the program one for the sizes that
    answer the same: it asks this first.
    """
    if not _is_exporting():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # it imports sympy, which nothing else needs

    return has_static_value(size)


def smaller(size: int, bound: int) -> int:
    """The minimum, by a comparison: that of an open size with a bound below all that it can be is then decided."""
    return bound if size >= bound else size


def cdiv(n: int, d: int) -> int:
    """n / d rounded up. ``triton.cdiv`` is for kernels too, which makes a call of it sixty times as long."""
    return (n + d - 1) // d


@functools.cache  # sizes of heads and tiles: few, and asked in every launch
def power_of_2(n: int) -> int:
    """The least power of two that is no less than n >= 1; as ``triton.next_power_of_2``, without what kernels need."""
    return 1 << (n - 1).bit_length()
