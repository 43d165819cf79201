"""The product of a weight with one row on a CPU, by all threads.

It takes as long as the weight comes from memory, and BLAS gives such a product to one thread, however many there are;
a batch of products it shares among them. So the weight's rows are a batch of parts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lizard_ops import nobody_looks

LEAST = 1 << 18  # numbers of a weight: below, threads wait longer for one another than they save


def row_product(weight: Tensor, row: Tensor, added: Tensor | None = None) -> Tensor:
    """``weight`` row [R], with ``added`` [R] if there is one: weight [R, D] contiguous, row [D], all on a CPU, float32.

    Every number is one dot product, in an order of sums that BLAS chooses.
    """
    parts = 1 << (torch.get_num_threads() - 1).bit_length()
    parts = math.gcd(len(weight), parts) if weight.numel() >= LEAST else 1
    if parts == 1:
        return torch.mv(weight, row) if added is None else torch.addmv(added, weight, row)
    weights, rows = weight.view(parts, -1, weight.shape[1]).transpose(1, 2), row.expand(parts, 1, -1)
    if added is None:
        return torch.bmm(rows, weights).view(-1)
    return torch.baddbmm(added.view(parts, 1, -1), rows, weights).view(-1)


class RowLinear(nn.Linear):
    """A Linear that reads many rows as any other, and one row of float32 on a CPU as ``row_product`` does."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., rows of the weight]."""
        weight, bias = self.weight, self.bias
        if not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.shape[-1]:
            plain = weight.is_contiguous() and nobody_looks(x, weight, bias) and not torch.is_autocast_enabled("cpu")
            if plain and x.dtype == weight.dtype == torch.float32:
                return row_product(weight, x.reshape(-1), bias).view(*x.shape[:-1], -1)
        return F.linear(x, weight, bias)


def with_row_product(module: nn.Module) -> nn.Module:
    """A ``RowLinear`` with the parameters of a Linear, which stays what it was; other modules as they are."""
    if type(module) is not nn.Linear:
        return module
    made = RowLinear.__new__(RowLinear)
    made.__dict__ = module.__dict__ | {"_parameters": dict(module._parameters)}
    return made
