"""The loss under a head that does not train: gradients of the hidden states come with it, and nothing is recomputed.

Shapes: N positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lizard_models.model.once import once, tie
from lizard_ops import row_losses

Head = Callable[[Tensor], Tensor]


class SoftCapped(nn.Module):
    """cap tanh(head(x) / cap), the logits of Gemma 2."""

    def __init__(self, head: nn.Module, cap: float) -> None:
        super().__init__()
        self.head, self.cap = head, cap

    def forward(self, hidden: Tensor) -> Tensor:
        return self.cap * torch.tanh(self.head(hidden) / self.cap)


def is_frozen(head: Head) -> bool:
    """Whether ``head`` is a linear layer, soft-capped or not, without a parameter that trains."""
    return isinstance(head, nn.Linear | SoftCapped) and not any(p.requires_grad for p in head.parameters())


def frozen_head_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    cross_entropy_weight: float,
    kl_weight: float,
    chunk: int,
) -> Tensor:
    """``losses.distillation_loss`` of hidden [N, H] and targets [N] that all count, for a head that ``is_frozen``.

    Differentiable in ``hidden`` once: a second derivative raises ValueError. The gradient over a chunk's logits is
    formed where the logits were and goes through the head at once, in the dtype of the logits.
    """
    return _WithGradient.apply(
        hidden, head, targets, teacher_hidden, teacher_head, cross_entropy_weight, kl_weight, chunk, tie(hidden)
    )


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
        cross_entropy_weight: float,
        kl_weight: float,
        chunk: int,
        source: Tensor | None,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            with torch.set_grad_enabled(wanted):
                leaf = hidden[part].detach().requires_grad_(wanted)
                logits = head(leaf)
            teacher = None if teacher_hidden is None or teacher_head is None else teacher_head(teacher_hidden[part])
            values = logits.detach()
            weights = cross_entropy_weight, kl_weight, 1 / len(targets) if wanted else None
            losses.append(row_losses(values, teacher, targets[part], *weights))
            if wanted:
                gradients += torch.autograd.grad(logits, leaf, values)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients) if len(gradients) > 1 else gradients[0], source)
        return torch.cat(losses).sum() / len(targets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, source = ctx.saved_tensors
        with torch.no_grad():
            of_hidden = gradient * grad
        instead = "the logits under a frozen head are gone; under one with a parameter that trains they are kept"
        return once("frozen_head_loss", instead, (of_hidden, *[None] * 8), (grad, source))
