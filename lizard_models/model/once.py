"""Gradients that come ready-made: a derivative of them is refused by name, where PyTorch would leave it out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor


def tie(x: Tensor) -> Tensor | None:
    """An empty tensor in the graph of x, to be kept in place of it; None where x has no gradient."""
    return x.flatten()[:0].clone() if torch.is_grad_enabled() and x.requires_grad else None


def once(
    what: str, instead: str, gradients: Iterable[Tensor | None], sources: Iterable[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients that a backward returns, none of which may be differentiated.

    sources: what they are functions of, or ``tie`` of it. ``torch.autograd.function.once_differentiable`` refuses only
    where the incoming gradient is a function of something; under ``loss.backward(create_graph=True)`` that is a
    constant, and the terms of a second derivative that pass through here would be missing without a word. Here a
    derivative of a gradient with respect to any of the sources raises ValueError with ``what`` and ``instead``.
    """
    there = [x for x in sources if x is not None and x.requires_grad]
    if not torch.is_grad_enabled() or not there:
        return tuple(gradients)
    return tuple(None if g is None else _Refused.apply(what, instead, g, *there) for g in gradients)


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, what: str, instead: str, gradient: Tensor, *_: Tensor) -> Tensor:
        ctx.said = f"{what}: got a second derivative (a gradient with create_graph=True), wanted a first one: {instead}"
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise ValueError(ctx.said)
