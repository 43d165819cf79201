"""The error between a layer's student and its teacher, with gradients that need one layer's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lizard_models.model.context import every_rank
from lizard_models.model.once import once, tie

TINY = torch.finfo(torch.float32).tiny  # below every sum of squares that is not zero


def output_error(
    student: Tensor, target: Tensor, kind: str, padding_mask: Tensor | None = None, context_group: Any = None
) -> Tensor:
    """One float32 number for how far the student's output is from the target.

    "relative": sum of squared errors over sum of squared targets, per head, averaged over heads. "mse": mean of squared
    errors. student, target [B, T, H, D]; padding_mask [B, T] bool, positions where it is False count for nothing.
    Differentiable in ``student``; without padding_mask once, and a ValueError says so to a second derivative.
    context_group: over whose ranks the positions lie in parts as long, without padding_mask; the errors of the ranks,
    of which each counts its own positions, have that of the whole for their mean.
    """
    if padding_mask is None:
        return _Error.apply(student, target.detach(), kind, tie(student), context_group)
    real = padding_mask[:, :, None, None]
    student, target = student.float() * real, target.float() * real
    squares = (student - target).square()
    if kind == "relative":
        return (squares.sum((0, 1, 3)) / target.square().sum((0, 1, 3)).clamp(min=TINY)).mean()
    return squares.sum() / (padding_mask.sum() * squares[0, 0].numel())


class _Error(torch.autograd.Function):
    """The error without padding: one float32 tensor, the difference, of which the gradient is a multiple per head."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, target: Tensor, kind: str, source: Tensor | None, context_group: Any
    ) -> Tensor:
        if target.dtype == torch.float64:
            target = target.float()
        difference = student.float() - target  # float32, also where the target is half precision
        squares = torch.linalg.vector_norm(difference, dim=(0, 1, 3)).square()  # [H]
        if kind == "relative":
            squares_of_target = torch.linalg.vector_norm(target, dim=(0, 1, 3), dtype=torch.float32).square()
            if context_group is not None:
                squares_of_target = every_rank(squares_of_target, context_group).mean(0)
            weights = (squares_of_target.clamp(min=TINY) * len(squares)).reciprocal()
        else:
            weights = torch.full_like(squares, 1 / difference.numel())
        ctx.save_for_backward(difference, weights, source)
        ctx.dtype = student.dtype
        return (squares * weights).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        difference, weights, source = ctx.saved_tensors
        with torch.no_grad():
            of_student = (difference * (2 * grad * weights)[:, None]).to(ctx.dtype)
        instead = "with a padding_mask, of ones too, the error is plain PyTorch and has any"
        return once("output_error", instead, (of_student, None, None, None, None), (grad, source))


def layer_loss(
    student_heads: Callable[[], Tensor],
    target: Tensor,
    kind: str,
    padding_mask: Tensor | None,
    parameters: Sequence[Tensor],
    project: Callable[[Tensor], Tensor] | None = None,
    context_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """``output_error`` of what ``student_heads()`` [B, T, Hq, D] gives against ``target``, and the former, detached.

    The error is differentiable in ``parameters``. The layer's graph is walked and freed at once, and only the gradients
    of its parameters are kept for the backward to come: a forward through every layer needs the memory of one.
    ``project`` (the output projection, [B, T, hidden]) is applied to the student's heads first; target is then what it
    makes of the teacher's.
    """

    def error() -> tuple[Tensor, Tensor]:
        student = student_heads()
        if project is None:
            value = output_error(student, target, kind, padding_mask, context_group)
        else:  # which has one head
            student = project(student)
            value = output_error(student.unsqueeze(2), target.unsqueeze(2), kind, padding_mask, context_group)
        return value, student.detach()

    return gradients_at_once(error, parameters)


def gradients_at_once(
    error: Callable[[], tuple[Tensor, Tensor]], parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``error()``, a loss and what comes with it; the loss is differentiable in ``parameters``, the rest is cut off.

    The graph of the loss is walked and freed at once, also where gradients are switched off around it. Without
    parameters it is ``error()`` as it is.
    """
    return _GradientsAtOnce.apply(error, *parameters) if parameters else error()


class _GradientsAtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, error: Callable[[], tuple[Tensor, Tensor]], *parameters: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            value, heads = error()
            gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        ctx.save_for_backward(*gradients)
        ctx.parameters = parameters  # not saved: they may change before the backward, which does not read them
        ctx.mark_non_differentiable(heads)
        return value.detach(), heads

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = torch._foreach_mul(list(ctx.saved_tensors), grad)
        instead = "the graph of a layer is freed as soon as its loss is known"
        return once('the losses of mode "distill"', instead, (None, *gradients), (grad, *ctx.parameters))
