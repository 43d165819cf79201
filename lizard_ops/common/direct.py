"""Registered operators without their dispatch, which takes longer than their kernels, where nobody looks."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)


def direct(op: Any, *tensors: Tensor | None) -> Callable[..., Any]:
    """The function of an operator of ``torch.library.custom_op`` where calling it does the same, else the operator.

    tensors: what it is called with. An operator that writes to some of them counts their versions up; its function
    leaves that to the caller.
    """
    return getattr(op, "_init_fn", op) if nobody_looks(*tensors) else op


class Looking(enum.Enum):
    """Who sees an operator that is called now."""

    NOBODY = enum.auto()
    AUTOGRAD = enum.auto()
    MORE = enum.auto()


def who_looks(*tensors: Any) -> Looking:
    """Whether an operator on these only runs, is recorded for its gradient too, or is seen by a transform, a mode, a
    tracer or a class of tensors."""
    recorded, looking = torch.is_grad_enabled(), Looking.NOBODY
    for x in tensors:
        if type(x) not in PLAIN:
            return Looking.MORE
        if recorded and x.requires_grad:
            looking = Looking.AUTOGRAD
    return Looking.MORE if is_watched() else looking


def nobody_looks(*tensors: Tensor | None) -> bool:
    """Whether an operator on these does nothing but run: no gradient is recorded, and no transform, mode, tracer or
    class of tensors sees it."""
    recorded = torch.is_grad_enabled()
    for x in tensors:  # a loop: this is asked before every launch
        if x is not None and (type(x) not in PLAIN or (recorded and x.requires_grad)):
            return False
    return not is_watched()


def is_watched(by_modes: bool = True) -> bool:
    """Whether a tracer, a transform or (``by_modes``) a mode sees the operators that are called now."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or (by_modes and torch._C._len_torch_dispatch_stack() > 0)
    )


def is_in_mode() -> bool:
    """Whether modes see the operators that are called now, and neither tracers nor transforms."""
    return not is_watched(by_modes=False) and torch._C._len_torch_dispatch_stack() > 0


def recorded(function: Any) -> Callable[..., Any]:
    """``apply`` of a function of autograd where ``is_watched`` has found nobody: without its own look for transforms,
    which walks through all arguments."""
    return super(torch.autograd.Function, function).apply
