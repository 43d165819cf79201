"""Loss and gradient of rows of logits in one kernel: each row is read twice and its gradient written in its place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.tiles.launcher import launch_kernel

BLOCK = 2048  # logits that a program holds at a time


@triton.jit
def log_sum_exp(row, columns, BLOCK: tl.constexpr):
    """log sum exp of a row of ``columns`` logits, a block at a time."""
    largest = -3.4e38  # finite, so that a block of minus infinities adds zeros
    total = 0.0
    for start in range(0, columns, BLOCK):
        v = start + tl.arange(0, BLOCK)
        b_z = tl.cast(tl.load(row + v, mask=v < columns, other=float("-inf")), tl.float32)
        larger = tl.maximum(largest, tl.max(b_z, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(b_z - larger), 0)
        largest = larger
    return largest + tl.log(total)


@triton.jit
def loss_kernel(
    student, teacher, targets, losses, columns, student_stride, teacher_stride, entropy_weight, kl_weight, scale,
    BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A program per row: its loss, and ``scale`` times the gradient over the student's logits."""
    i = tl.program_id(0)
    student += tl.cast(i, tl.int64) * student_stride
    target = tl.load(targets + i)
    log_student = tl.cast(tl.load(student + target), tl.float32)
    sum_student = log_sum_exp(student, columns, BLOCK)
    loss = entropy_weight * (sum_student - log_student)
    if teacher is not None:
        teacher += tl.cast(i, tl.int64) * teacher_stride
        sum_teacher = log_sum_exp(teacher, columns, BLOCK)
    if GRADIENT or teacher is not None:
        divergence = 0.0
        for start in range(0, columns, BLOCK):
            v = start + tl.arange(0, BLOCK)
            here = v < columns
            b_s = tl.cast(tl.load(student + v, mask=here, other=float("-inf")), tl.float32) - sum_student
            b_d = (entropy_weight + kl_weight) * tl.exp(b_s)
            if teacher is not None:
                b_t = tl.cast(tl.load(teacher + v, mask=here, other=float("-inf")), tl.float32) - sum_teacher
                b_p = tl.exp(b_t)
                divergence += tl.sum(tl.where(here, b_p * (b_t - b_s), 0.0), 0)
                b_d -= kl_weight * b_p
            if GRADIENT:
                b_d = scale * tl.where(v == target, b_d - entropy_weight, b_d)
                tl.store(student + v, b_d.to(student.dtype.element_ty), mask=here)
        loss += kl_weight * divergence
    tl.store(losses + i, loss)


def triton_row_losses(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    entropy_weight: float,
    kl_weight: float,
    scale: float | None,
) -> Tensor:
    """Losses [N] float32 of rows of logits [N, V]; unless ``scale`` is None, the logits become scale times gradients.

    targets [N] int64, each in [0, V). kl_weight must be 0 without a teacher.
    """
    rows, columns = student.shape
    losses = student.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses
    teacher = teacher if teacher is None or teacher.stride(1) == 1 else teacher.contiguous()
    targets = targets.contiguous()
    with on_device(student):
        launch_kernel(
            loss_kernel, rows,
            student, teacher, targets, losses, columns, student.stride(0), 0 if teacher is None else teacher.stride(0),
            float(entropy_weight), float(kl_weight), 0.0 if scale is None else scale,
            BLOCK=min(BLOCK, triton.next_power_of_2(columns)), GRADIENT=scale is not None, num_warps=8,
        )  # fmt: skip
    return losses
