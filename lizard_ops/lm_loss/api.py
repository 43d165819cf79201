"""The losses of rows of logits, and their gradients in the logits' own memory: the public function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.dispatch import choose_impl


def row_losses(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    cross_entropy_weight: float,
    kl_weight: float,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy to a target and KL divergence to a teacher's logits, of every row of logits at once::

        loss = w_ce (-log p_s(target)) + w_kl sum_v p_t(v) (log p_t(v) - log p_s(v))

    Args:
        student: [N, V] logits, any floating dtype. With ``scale`` they are overwritten, with ``scale`` times the
            gradient of their row's loss: no second tensor of their size is made.
        teacher: [N, V] logits, or None, which counts as ``kl_weight=0``.
        targets: [N] int64, each in [0, V).
        cross_entropy_weight, kl_weight: w_ce and w_kl.
        scale: factor of the gradients; None leaves the student's logits as they are.
        impl: "auto" (Triton on CUDA tensors, PyTorch elsewhere), "triton", "torch" or "naive" (which is "torch").

    Softmax and losses are float32. Autograd records nothing: the gradient is what ``scale`` asks for.

    Returns:
        losses [N], float32.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, student logits whose rows are not contiguous, or an
            impl that cannot do what is asked.
    """
    fits = isinstance(student, Tensor) and student.ndim == 2 and student.dtype in checks.FLOATS and student.shape[1] > 0
    fits = fits and (student.stride(1) == 1 or student.shape[1] == 1)
    checks.want(fits, "student", student, "a floating tensor [N, V] with contiguous rows, V >= 1")
    if teacher is not None:
        checks.check_tensor("teacher", teacher, student.shape, student, checks.FLOATS)
    checks.check_tensor("targets", targets, student.shape[:1], student, (torch.int64,))
    if scale is not None and student.shape[0] > 1 and student.stride(0) < student.shape[1]:
        raise ValueError(f"student: got strides {student.stride()}, wanted rows apart in memory, to be overwritten")
    if teacher is None:
        kl_weight = 0.0
    if choose_impl(impl, student, None) == "triton":
        from lizard_ops.lm_loss.triton_op import triton_row_losses

        return triton_row_losses(student, teacher, targets, cross_entropy_weight, kl_weight, scale)
    with torch.no_grad():
        return torch_row_losses(student, teacher, targets, cross_entropy_weight, kl_weight, scale)


def torch_row_losses(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    cross_entropy_weight: float,
    kl_weight: float,
    scale: float | None,
) -> Tensor:
    """``row_losses`` in plain PyTorch."""
    log_student = F.log_softmax(student.float(), -1)
    losses = cross_entropy_weight * F.nll_loss(log_student, targets, reduction="none")
    log_teacher = None if teacher is None else F.log_softmax(teacher.float(), -1)
    if log_teacher is not None:
        losses = losses + kl_weight * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    if scale is not None:
        gradient = log_student.exp_().mul_(cross_entropy_weight + kl_weight)
        if log_teacher is not None:
            gradient.sub_(log_teacher.exp_(), alpha=kl_weight)
        rows = torch.arange(len(targets), device=targets.device)
        gradient[rows, targets] -= cross_entropy_weight
        student.copy_(gradient.mul_(scale))
    return losses
