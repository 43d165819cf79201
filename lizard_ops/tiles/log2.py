"""Kernels exponentiate and take logs to base 2, which is what the hardware has."""

from __future__ import annotations

import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # log2 of e: natural logs to base 2
LN2 = tl.constexpr(0.6931471805599453)  # and back
