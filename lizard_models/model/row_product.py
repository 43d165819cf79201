"""The product of one row with a weight on a CPU, as oneDNN has it.

A row's product takes as long as its weight comes from memory, and oneDNN's kernel reads rows of a few KiB faster than
the BLAS behind ``F.linear``. It shares even the smallest product among all threads, which then wait for one another
after each: a step of several threads stays with BLAS, whose product of a row is one thread's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lizard_ops import nobody_looks

LEAST = 1 << 20  # numbers of a weight: below, finding the kernel takes longer than it saves


def row_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``F.linear(x, weight, bias)`` of x [..., 1, D] but for the order of sums; None where it is not to be this one's:
    more than a row, on another device, not of float32, of several threads, or seen by somebody."""
    if torch.compiler.is_compiling() or weight.numel() < LEAST:
        return None
    if x.numel() != x.shape[-1] or x.device.type != "cpu" or torch.get_num_threads() != 1:
        return None
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not torch._C._get_mkldnn_enabled():
        return None
    if _op is None or not nobody_looks(x, weight, bias) or torch.is_autocast_enabled("cpu"):
        return None
    return _op(x, weight, bias, "none", [], "")


class RowLinear(nn.Linear):
    """A Linear that reads many rows as any other, and one row as ``row_product`` does where it may."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., rows of the weight]."""
        y = row_product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias) if y is None else y


def with_row_product(module: nn.Module) -> nn.Module:
    """A ``RowLinear`` with the parameters of a Linear, which stays what it was; other modules as they are."""
    if type(module) is not nn.Linear:
        return module
    made = RowLinear.__new__(RowLinear)
    made.__dict__ = module.__dict__ | {"_parameters": dict(module._parameters)}
    return made


def _found() -> torch._ops.OpOverload | None:
    """What torch.compile takes for a Linear on a CPU; not in every build."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return torch.ops.mkldnn._linear_pointwise.default


_op = _found()
