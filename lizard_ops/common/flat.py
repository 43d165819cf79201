"""Registered operators take flat arguments: how they become named objects and how they come back, by name alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import torch

Kind = TypeVar("Kind")


def taken(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """A NamedTuple of this kind from those of the values that it has fields for; the rest keep their defaults."""
    return kind(**{name: values[name] for name in kind._fields if name in values})  # type: ignore[attr-defined]


@functools.cache
def argument_names(op: torch._ops.OpOverload) -> tuple[str, ...]:
    """The names in an operator's schema, in its order."""
    return tuple(argument.name for argument in op._schema.arguments)


def by_name(op: torch._ops.OpOverload, values: Sequence[Any]) -> dict[str, Any]:
    """What autograd hands on as a sequence, under the names of the operator's schema.

    ``needs_input_grad`` ends before the last arguments that were left at their defaults.
    """
    return dict(zip(argument_names(op), values, strict=False))


def in_order(op: torch._ops.OpOverload, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """One value an argument of the operator, None where there is none, as autograd wants gradients."""
    return tuple(values.get(name) for name in argument_names(op))


def differentiable_once(op: Any, what: str) -> None:
    """Let an operator that computes gradients refuse to be differentiated: kernels have no second derivatives."""

    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise ValueError(
            f'impl: got "triton" for a second derivative of {what}, wanted "torch" or "naive": its kernels have first '
            "derivatives only (backward or grad with create_graph=True)"
        )

    op.register_autograd(backward)
