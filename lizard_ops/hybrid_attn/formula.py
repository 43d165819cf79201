"""Hybrid attention as one formula over all pairs of positions: what every form of the op computes.

No state, no packing, no padding; [T, T] matrices. The naive op is tested against it, everything else against that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.gated_attn.formula import gated_formula
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, linear_inputs
from lizard_ops.window_attn.formula import window_formula


def hybrid_formula(x: HybridInputs, options: HybridOptions) -> Tensor:
    """o [B, T, Hq, V] of checked arguments, in their dtype::

    o_lin, log_mass    the gated formula of phi(fq) and phi(fk), over all keys or those outside the window
    o_win, lse, m      the window formula of q and k
    expiry e           key j is exact for queries j <= i < e_j, and outside for i >= e_j; without, e_j = j + window
                       (coverage="left": among the linear branch's keys for i >= j + window)
    mix="sum"          o = o_lin + alpha o_win
    mix="merge"        o = share o_lin + (1 - share) o_win,  share = sigmoid(log_mass - M + merge_bias)
                       M = lse - m with merge_mass="relative", lse with "absolute"
    """
    linear = linear_inputs(x, options)._replace(q=phi(x.fq, options.feature_map), k=phi(x.fk, options.feature_map))
    o_lin, log_mass = gated_formula(linear, options.linear)
    o_win, lse, row_max = window_formula(x.local, options.local)
    if options.mix == "sum":
        return o_lin + (o_win if x.alpha is None else x.alpha.unsqueeze(-1) * o_win)
    bias = 0.0 if x.merge_bias is None else x.merge_bias
    share = torch.sigmoid(log_mass - (lse - row_max if options.merge_mass == "relative" else lse) + bias)
    return share.unsqueeze(-1) * o_lin + (1 - share).unsqueeze(-1) * o_win


def phi(x: Tensor, feature_map: str) -> Tensor:
    """Features of pre-activations [B, T, H, Fp]: [softmax(x), softmax(-x)], [exp(x), exp(-x)] or x itself."""
    if feature_map == "identity":
        return x
    half = torch.exp if feature_map == "exp" else lambda y: y.softmax(-1)
    return torch.cat([half(x), half(-x)], -1)
