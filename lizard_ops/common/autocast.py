"""What autocast means to the ops: their inputs take its dtype, their sums do not."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

AS_IT_IS: contextlib.AbstractContextManager = contextlib.nullcontext()  # one for all, asked for in every layer


def autocast_inputs(*inputs: Any) -> tuple[Any, ...]:
    """Under autocast, float32 and half inputs in its dtype; everything else, and everything without it, unchanged."""
    first = inputs[0]
    if not isinstance(first, Tensor) or not _enabled(first.device.type):
        return inputs
    dtype = torch.get_autocast_dtype(first.device.type)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in narrow else x for x in inputs)


def without_autocast(like: Tensor) -> contextlib.AbstractContextManager:
    """A context in which products of float32 tensors stay float32."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if _enabled(kind) else AS_IT_IS


def _enabled(kind: str) -> bool:
    """Whether autocast is on for a kind of device. On meta there is none, and asking raises.

    Asked by name: torch 2.11 cannot trace ``torch.amp.is_autocast_available``.
    """
    return kind != "meta" and torch.is_autocast_enabled(kind)
