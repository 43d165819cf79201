"""Elementary functions whose result for an element does not depend on what stands beside it."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_capped(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(scores / softcap): within +-softcap, and the score itself where it is small. None leaves them."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def tied_to(x: Tensor, *inputs: Tensor | None) -> Tensor:
    """x, which depends on none of these inputs, in their graph: each has a gradient, of zeros, rather than none.

    Sums over no entries, so that nothing that they hold (NaN too) reaches x.
    """
    for source in inputs if torch.is_grad_enabled() else ():
        if source is not None and source.requires_grad:
            x = x + source.flatten()[:0].sum().to(x.dtype)
    return x


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)); torch.sigmoid rounds differently in the last elements of a tensor.

    Below -80 (-700 in float64) the result stays at that of the bound, where it is 0 for every practical purpose.
    """
    return 1.0 / (1.0 + (-x.clamp(min=-700.0 if x.dtype == torch.float64 else -80.0)).exp())
