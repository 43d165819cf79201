"""Parameters that keep float32 inside a half-precision model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module whose parameters stay float32 under ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    An update a thousandth of the size of a bfloat16 parameter rounds to nothing, so learned gates, maps and biases
    would stand still. A move to another device, or to float64, is followed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep, recurse)

    def reset_parameters(self) -> None:
        """Write the starting values into this module's own parameters."""


def float32_parameter(*shape: int) -> nn.Parameter:
    """An uninitialised float32 parameter; float64 where that is the default dtype, as in a model loaded in it."""
    exact = torch.get_default_dtype() == torch.float64
    return nn.Parameter(torch.empty(shape, dtype=torch.float64 if exact else torch.float32))


def full_precision(x: Tensor) -> Tensor:
    """x in float32, float64 left as it is."""
    return x if x.dtype == torch.float64 else x.float()


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody sees what this module is called with, or has put a forward in place of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
