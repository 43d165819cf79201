"""Kernels of a matrix per head. Tokens n = b T + t; a weight of float32 enters 16-bit products as a sum of two parts.

Numbers of heads and matrices are no constants, so that queries and keys share a kernel: a first call compiles less.
Strides y_* are in steps of YU elements: Triton knows of an argument only whether 16 divides it, and rows of 40 features
would be read number by number.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lizard_ops.tiles.sums import add_product


@triton.jit
def token_offsets(n, tokens, length, stride_b, stride_t):
    """(offsets of tokens n, whether they exist)."""
    n64 = n.to(tl.int64)
    return n64 // length * stride_b + n64 % length * stride_t, n < tokens


@triton.jit
def dot_split(a, weight, acc, PRECISION: tl.constexpr):
    """a weight + acc with float32's digits of the weight."""
    if a.dtype == tl.float32:
        acc = tl.dot(a, weight, acc, input_precision=PRECISION)
    else:
        high = weight.to(a.dtype)
        low = (weight - high.to(tl.float32)).to(a.dtype)
        acc = tl.dot(a, low, acc)
        acc = tl.dot(a, high, acc)
    return acc


@triton.jit
def project_tiles(
    pid, x, weight, y, tokens, length, x_b, x_t, x_h, H, M,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y [tokens, H, F] of STEPS blocks of tokens, one head, BF columns."""
    NFB: tl.constexpr = (F + BF - 1) // BF
    h = (pid // NFB) % H
    f = (pid % NFB) * BF + tl.arange(0, BF)
    d = tl.arange(0, BD)
    of_w = (h // (H // M)) * D * F + d[:, None] * F + f[None, :]
    b_w = tl.load(weight + of_w, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0)
    first = pid // (NFB * H) * (STEPS * BN)
    for step in tl.range(0, STEPS):
        n = first + tl.cast(step, tl.int32) * BN + tl.arange(0, BN)
        rows, here = token_offsets(n, tokens, length, x_b, x_t)
        b_x = tl.load(x + rows[:, None] + h * x_h + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
        b_y = dot_split(b_x, b_w, tl.zeros([BN, BF], tl.float32), PRECISION)
        p_y = y + ((n.to(tl.int64) * H + h) * F)[:, None] + f[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=here[:, None] & (f < F)[None, :])


@triton.jit(do_not_specialize=["H", "M"])
def project_kernel(
    x, weight, y, tokens, length, x_b, x_t, x_h, H, M,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``project_tiles`` of one x."""
    project_tiles(
        tl.program_id(0), x, weight, y, tokens, length, x_b, x_t, x_h, H, M, D, BD, F, BF, BN, STEPS, PRECISION
    )


@triton.jit(do_not_specialize=["HQ", "MQ", "HK", "MK", "first"])
def project_both_kernel(
    q, k, weight_q, weight_k, y_q, y_k, tokens, length, q_b, q_t, q_h, k_b, k_t, k_h, HQ, MQ, HK, MK, first,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``project_tiles`` of queries by the first programs, and of keys by the others."""
    pid = tl.program_id(0)
    if pid < first:
        project_tiles(pid, q, weight_q, y_q, tokens, length, q_b, q_t, q_h, HQ, MQ, D, BD, F, BF, BN, STEPS, PRECISION)
    else:
        project_tiles(
            pid - first, k, weight_k, y_k, tokens, length, k_b, k_t, k_h, HK, MK, D, BD, F, BF, BN, STEPS, PRECISION
        )


@triton.jit
def transposed_weight(weight, first, d, D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """Columns first.. of one head's matrix as rows [BF, BD]."""
    f = first + tl.arange(0, BF)
    return tl.load(weight + d[None, :] * F + f[:, None], mask=(d < D)[None, :] & (f < F)[:, None], other=0.0)


@triton.jit(do_not_specialize=["H", "M"])
def input_gradient_kernel(
    dy, weight, d_x, dx, tokens, length, y_b, y_t, y_h, x_b, x_t, x_h, H, M,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr, YU: tl.constexpr, STEPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [tokens, H, D] = dy weight^T, plus the gradient d_x of x's other readers if it is there."""
    NFB: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    h = pid % H
    d = tl.arange(0, BD)
    first = pid // H * (STEPS * BN)
    weight += (h // (H // M)) * D * F
    if NFB == 1:
        b_w = transposed_weight(weight, 0, d, D, F, BF)
    for step in tl.range(0, STEPS):
        n = first + tl.cast(step, tl.int32) * BN + tl.arange(0, BN)
        rows, here = token_offsets(n, tokens, length, y_b, y_t)
        mask = here[:, None] & (d < D)[None, :]
        acc = tl.zeros([BN, BD], tl.float32)
        for fb in tl.static_range(NFB):
            f = fb * BF + tl.arange(0, BF)
            if NFB > 1:
                b_w = transposed_weight(weight, fb * BF, d, D, F, BF)
            p_dy = dy + (rows * YU)[:, None] + h * y_h * YU + f[None, :]
            b_dy = tl.load(p_dy, mask=here[:, None] & (f < F)[None, :], other=0.0)
            acc = dot_split(b_dy, b_w, acc, PRECISION)
        if d_x is not None:
            other, _ = token_offsets(n, tokens, length, x_b, x_t)
            acc += tl.load(d_x + other[:, None] + h * x_h + d[None, :], mask=mask, other=0.0).to(tl.float32)
        p_dx = dx + ((n.to(tl.int64) * H + h) * D)[:, None] + d[None, :]
        tl.store(p_dx, acc.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["H", "M"])
def weight_gradient_kernel(
    x, dy, parts, tokens, length, x_b, x_t, x_h, y_b, y_t, y_h, steps, H, M,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr, YU: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What ``steps`` blocks of tokens add to the gradient of one head's matrix, parts [splits, H, D, F] float32."""
    NFB: tl.constexpr = (F + BF - 1) // BF
    pid = tl.program_id(0)
    h = (pid // NFB) % H
    split = pid // (NFB * H)
    f = (pid % NFB) * BF + tl.arange(0, BF)
    d = tl.arange(0, BD)
    acc = tl.zeros([BD, BF], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (split * steps + tl.cast(step, tl.int32)) * BN + tl.arange(0, BN)
        rows_x, here = token_offsets(n, tokens, length, x_b, x_t)
        rows_y, _ = token_offsets(n, tokens, length, y_b, y_t)
        b_x = tl.load(x + rows_x[None, :] + h * x_h + d[:, None], mask=here[None, :] & (d < D)[:, None], other=0.0)
        p_dy = dy + (rows_y * YU)[:, None] + h * y_h * YU + f[None, :]
        b_dy = tl.load(p_dy, mask=here[:, None] & (f < F)[None, :], other=0.0)
        acc = add_product(acc, b_x, b_dy, tokens > 0, PRECISION)
    of_w = ((split * H + h) * D).to(tl.int64) * F + d[:, None] * F + f[None, :]
    tl.store(parts + of_w, acc, mask=(d < D)[:, None] & (f < F)[None, :])


@triton.jit
def both_gradients(
    pid, x, dy, weight, d_x, dx, parts, tokens, length, x_b, x_t, x_h, y_b, y_t, y_h, o_b, o_t, o_h, steps, H, M,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr, YU: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``input_gradient_kernel`` and ``weight_gradient_kernel`` from one reading of dy, which fits in BF columns."""
    h = pid % H
    split = pid // H
    d, f = tl.arange(0, BD), tl.arange(0, BF)
    b_w = transposed_weight(weight + (h // (H // M)) * D * F, 0, d, D, F, BF)
    acc = tl.zeros([BD, BF], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (split * steps + tl.cast(step, tl.int32)) * BN + tl.arange(0, BN)
        rows_x, here = token_offsets(n, tokens, length, x_b, x_t)
        rows_y, _ = token_offsets(n, tokens, length, y_b, y_t)
        mask = here[:, None] & (d < D)[None, :]
        p_dy = dy + (rows_y * YU)[:, None] + h * y_h * YU + f[None, :]
        b_dy = tl.load(p_dy, mask=here[:, None] & (f < F)[None, :], other=0.0)
        b_x = tl.load(x + rows_x[None, :] + h * x_h + d[:, None], mask=here[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(b_x, b_dy, acc, input_precision=PRECISION)
        b_dx = dot_split(b_dy, b_w, tl.zeros([BN, BD], tl.float32), PRECISION)
        if d_x is not None:
            rows_o, _ = token_offsets(n, tokens, length, o_b, o_t)
            b_dx += tl.load(d_x + rows_o[:, None] + h * o_h + d[None, :], mask=mask, other=0.0).to(tl.float32)
        p_dx = dx + ((n.to(tl.int64) * H + h) * D)[:, None] + d[None, :]
        tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=mask)
    of_w = ((split * H + h) * D).to(tl.int64) * F + d[:, None] * F + f[None, :]
    tl.store(parts + of_w, acc, mask=(d < D)[:, None] & (f < F)[None, :])


@triton.jit(do_not_specialize=["H", "M"])
def both_gradients_kernel(
    x, dy, weight, d_x, dx, parts, tokens, length, x_b, x_t, x_h, y_b, y_t, y_h, o_b, o_t, o_h, steps, H, M,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr, YU: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``both_gradients`` of one x."""
    both_gradients(
        tl.program_id(0), x, dy, weight, d_x, dx, parts, tokens, length, x_b, x_t, x_h, y_b, y_t, y_h, o_b, o_t, o_h,
        steps, H, M, D, BD, F, BF, BN, YU, STAGES, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["HQ", "MQ", "HK", "MK", "first"])
def gradients_of_both_kernel(
    q, dy_q, weight_q, dq, parts_q, k, dy_k, weight_k, dk, parts_k, tokens, length, q_b, q_t, q_h, dyq_b, dyq_t, dyq_h,
    dq_b, dq_t, dq_h, k_b, k_t, k_h, dyk_b, dyk_t, dyk_h, dk_b, dk_t, dk_h, steps, HQ, MQ, HK, MK, first,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BN: tl.constexpr, YU: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``both_gradients`` of queries by the first programs, and of keys by the others; both are added to dq and dk."""
    pid = tl.program_id(0)
    if pid < first:
        both_gradients(
            pid, q, dy_q, weight_q, dq, dq, parts_q, tokens, length, q_b, q_t, q_h, dyq_b, dyq_t, dyq_h, dq_b, dq_t,
            dq_h, steps, HQ, MQ, D, BD, F, BF, BN, YU, STAGES, PRECISION,
        )  # fmt: skip
    else:
        both_gradients(
            pid - first, k, dy_k, weight_k, dk, dk, parts_k, tokens, length, k_b, k_t, k_h, dyk_b, dyk_t, dyk_h, dk_b,
            dk_t, dk_h, steps, HK, MK, D, BD, F, BF, BN, YU, STAGES, PRECISION,
        )  # fmt: skip
