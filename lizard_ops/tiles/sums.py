"""Sums of products over many tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(acc, a, b, held, PRECISION: tl.constexpr):
    """acc + a b. held: true wherever the result is used, a bool that broadcasts to it and is known at run time alone.

    Products of float32 as it is ("ieee") are fused multiply-adds, one after the other: begun from ``acc``, a sum of
    thousands of terms would round at its full size for every term. They begin from zero in every tile instead, so that
    the full sum rounds once a tile. The select is there for the compiler, which makes of ``acc + dot`` a product begun
    from ``acc``. Tensor cores sum a tile up by themselves and begin from ``acc``.
    """
    if PRECISION == "ieee":
        return acc + tl.where(held, tl.dot(a, b, input_precision=PRECISION), 0.0)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)
