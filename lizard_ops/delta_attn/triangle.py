"""Inverse of unit lower triangular tiles by matrix products alone.

The tiles of a chunk are small and many. ``torch.linalg.solve_triangular`` calls a library for them whose launches and
workspaces depend on version and count; matrix products are captured in CUDA graphs everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + L)^-1 for L [..., C, C], C a power of two, of which only what is below the diagonal counts.

    Halves: [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]], from tiles of 1 up to C. Like forward substitution
    it never adds what cancels later, as a product of powers of L would. Differentiable any number of times.
    """
    return _UnitLowerInverse.apply(lower)


class _UnitLowerInverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = _inverse(lower)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, d_inverse: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ d_inverse @ turned).tril(-1)


def _inverse(lower: Tensor) -> Tensor:
    size = lower.shape[-1]
    done, width = torch.ones_like(lower[..., :1]).unsqueeze(-1), 1  # [..., C / w, w, w], inverses along the diagonal
    while width < size:
        pairs = size // (2 * width)
        tiles = lower.unflatten(-2, (pairs, 2 * width)).unflatten(-1, (pairs, 2 * width))
        below = tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., width:, :width]  # [..., pairs, w, w]
        first, second = done[..., 0::2, :, :], done[..., 1::2, :, :]
        corner = -(second * below * first if width == 1 else second @ (below @ first))
        upper = torch.cat([first, torch.zeros_like(first)], -1)
        done, width = torch.cat([upper, torch.cat([corner, second], -1)], -2), 2 * width
    return done.squeeze(-3)
