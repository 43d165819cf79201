"""How the two branches of the hybrid op become one output."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lizard_ops.common.numerics import logistic


def mixed(
    o_lin: Tensor,  # [..., Hq, V]
    log_mass: Tensor,  # [..., Hq]
    o_win: Tensor,  # [..., Hq, V]
    lse: Tensor,  # [..., Hq]
    row_max: Tensor,  # [..., Hq]
    *,
    mix: str,
    weight: Tensor | None,  # [Hq] or [..., Hq]: alpha of a sum, merge_bias of a merge
    merge_mass: str,
) -> Tensor:
    """The sum o_lin + alpha o_win, or the average by mass; the row maximum is differentiated like all else."""
    weight = None if weight is None else weight.to(o_lin.dtype)
    if mix == "sum":
        return o_lin + (o_win if weight is None else weight.unsqueeze(-1) * o_win)
    none = log_mass == -math.inf
    logit = log_mass.masked_fill(none, 0.0) - (lse - row_max if merge_mass == "relative" else lse)
    share = logistic(logit if weight is None else logit + weight).masked_fill(none, 0.0)
    return torch.lerp(o_win, o_lin, share.unsqueeze(-1))
