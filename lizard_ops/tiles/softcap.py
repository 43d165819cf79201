"""Soft-capped scores in tiles: softcap tanh(s / softcap) in place of the score s = scale q.k.

Kernels that compare and exponentiate ``units * score`` need no other change: with cap = scale / softcap a raw score x
becomes tanh(cap x) and its units softcap in place of scale. The gradient of x is that of the score times
scale (1 - tanh(cap x)^2).
"""

from __future__ import annotations

import triton
import triton.language as tl


def cap_of(scale: float, softcap: float | None) -> float | None:
    """What the kernels take as ``cap``."""
    return None if softcap is None else scale / softcap


def units_of(scale: float, softcap: float | None) -> float:
    """Factor of the scores that ``capped`` returns, natural units."""
    return scale if softcap is None else softcap


@triton.jit
def units(scale, cap):
    """``units_of`` inside a kernel."""
    if cap is None:
        return scale
    else:
        return scale / cap


@triton.jit
def capped(x, cap):
    """tanh(cap x), x itself without a cap.

    Near 0, where 1 - exp(-2 x) has lost its digits, a quotient of Lambert's continued fraction (to 6e-9 at the bound).
    """
    if cap is None:
        return x
    else:
        x = x * cap
        square = tl.minimum(x * x, 1.0)
        near = tl.abs(x) < 0.75
        e = tl.exp2(tl.abs(x) * -2.8853900817779268)
        above = tl.where(near, x * (945.0 + square * (105.0 + square)), tl.where(x < 0, e - 1.0, 1.0 - e))
        return above / tl.where(near, 945.0 + square * (420.0 + 15.0 * square), 1.0 + e)


@triton.jit
def cap_slope(capped_score, cap):
    """Derivative of a capped score by the score, 1 without a cap."""
    if cap is None:
        return 1.0
    else:
        return (1.0 - capped_score) * (1.0 + capped_score)
