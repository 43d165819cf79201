"""Feature maps in tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.tiles.log2 import LOG2E


@triton.jit
def half_features(x, sign, FP: tl.constexpr, BF: tl.constexpr, AXIS: tl.constexpr, MAP: tl.constexpr):
    """softmax(sign x) or exp(sign x - max |x|) of a tile of pre-activations, float32; finished features as they are."""
    if MAP == "exp":
        return exponential(x, sign, FP, BF, AXIS)
    x = x.to(tl.float32)
    if MAP == "softmax":
        scale = sign * LOG2E
        if FP != BF:
            x = tl.where(tl.expand_dims(tl.arange(0, BF) < FP, 1 - AXIS), x, sign * float("-inf"))
        x = tl.exp2(x * scale - tl.max(x * sign, AXIS, keep_dims=True) * LOG2E)
        return x * (1.0 / tl.sum(x, AXIS, keep_dims=True))
    else:
        return x


@triton.jit
def exponential(x, sign, FP: tl.constexpr, BF: tl.constexpr, AXIS: tl.constexpr):
    """exp(sign x - max |x|), to float32's digits but for bfloat16 inputs: small features may be all that keys have."""
    y = x.to(tl.float32)
    y = y * sign - tl.max(tl.abs(y), AXIS, keep_dims=True)
    if x.dtype == tl.bfloat16:
        y = tl.exp2(y * LOG2E)
    else:
        y = tl.maximum(y, -150.0)
        whole = tl.floor(y * LOG2E + 0.5)
        rest = (y - whole * 0.693359375) + whole * 2.1219444005469057e-4  # less whole times log 2, in two parts
        y = tl.exp2(whole) * tl.exp2(rest * LOG2E)
    if FP != BF:
        y = tl.where(tl.expand_dims(tl.arange(0, BF) < FP, 1 - AXIS), y, 0.0)
    return y


@triton.jit
def exponential_log2(x):
    """Log2 of what ``exponential`` divides rows of pre-activations by."""
    return tl.max(tl.abs(x.to(tl.float32)), 1) * LOG2E


@triton.jit
def features(x, FP: tl.constexpr, BF: tl.constexpr, AXIS: tl.constexpr, MAP: tl.constexpr):
    """Both halves of the features of a tile; for finished features both are the tile."""
    return half_features(x, 1.0, FP, BF, AXIS, MAP), half_features(x, -1.0, FP, BF, AXIS, MAP)


@triton.jit
def features_backward(plus, minus, d_plus, d_minus, MAP: tl.constexpr):
    """Gradient of the pre-activations from that of both halves, features along axis 1."""
    if MAP == "exp":
        return plus * d_plus - minus * d_minus
    elif MAP == "softmax":
        d_plus = plus * (d_plus - tl.sum(plus * d_plus, 1, keep_dims=True))
        d_minus = minus * (d_minus - tl.sum(minus * d_minus, 1, keep_dims=True))
        return d_plus - d_minus
    else:
        return d_plus
