"""Gated linear attention as one formula over all pairs of positions: what every form of the op computes.

No state, no packing, no padding; [T, T] matrices. The naive op is tested against it, everything else against that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions


def gated_formula(x: GatedInputs, options: GatedOptions) -> tuple[Tensor, Tensor]:
    """(o [B, T, Hq, V], log mass [B, T, Hq]) of checked arguments, in their dtype::

    a_ij = scale q_i.k_j exp(g_{j+1} + ... + g_i)        anchors <= j <= i - window_offset
                                                         and expiry_j <= i instead, where there is one
    o_i  = sum_j a_ij v_j, divided by sum_j a_ij with normalize
    """
    heads = x.q.shape[2]
    k, v = per_query_head(x.k, heads), per_query_head(x.v, heads)
    j = torch.arange(x.q.shape[1], device=x.q.device)
    i = j[:, None]
    seen = ((j >= options.anchors) & (j <= i - options.window_offset))[..., None]  # [i, j, 1]
    if x.expiry is not None:
        seen = (j >= options.anchors)[:, None] & (per_query_head(x.expiry, heads)[:, None] <= i[..., None])
    products = x.q.unsqueeze(2) * k.unsqueeze(1)  # [B, i, j, Hq, K]
    if x.g is not None:
        g = per_query_head(x.g if x.g.ndim == 4 else x.g.unsqueeze(-1), heads)  # [B, T, Hq, 1 or K]
        passed = g.unsqueeze(2).where((i > j)[..., None, None], 0.0).cumsum(1)  # g_{j+1} + ... + g_i
        products = products * passed.exp()
    a = options.scale * products.sum(-1) * seen
    mass = a.sum(2)
    o = torch.einsum("bijh,bjhv->bihv", a, v)
    if options.normalize:
        o = o / mass.where(mass != 0, 1.0).unsqueeze(-1)  # where no key is eligible, o is 0
    return o, mass.log()


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """x [B, T, H, ...] with every head as often as query heads read it."""
    return x.repeat_interleave(heads // x.shape[2], 2)
