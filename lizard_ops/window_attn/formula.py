"""Window attention as one formula over all pairs of positions: what every form of the op computes.

No state, no packing, no padding; [T, T] matrices. The naive op is tested against it, everything else against that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions


def window_formula(x: WindowInputs, options: WindowOptions) -> tuple[Tensor, Tensor, Tensor]:
    """(o [B, T, Hq, V], lse [B, T, Hq], row maximum [B, T, Hq]) of checked arguments, in their dtype::

    s_ij  = scale q_i.k_j, or softcap tanh(scale q_i.k_j / softcap)     i - window < j <= i, and j < anchors
            the row maximum is theirs; with an expiry                   j <= i < expiry_j too
    o_i   = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + c)
    lse_i = log of that denominator
    c     = sum_m exp(t_m) of the sinks t, or sum_m t_m with sink_form="linear"
    """
    k, v = (t.repeat_interleave(x.q.shape[2] // t.shape[2], 2) for t in (x.k, x.v))
    j = torch.arange(x.q.shape[1], device=x.q.device)
    i = j[:, None]
    near = seen = ((j <= i) & ((j > i - options.window) | (j < options.anchors)))[..., None]
    if x.expiry is not None:
        expiry = x.expiry.repeat_interleave(x.q.shape[2] // x.k.shape[2], 2)
        seen = near | ((j <= i)[..., None] & (i[..., None] < expiry[:, None]))  # [B, i, j, Hq]
    s = options.scale * torch.einsum("bihd,bjhd->bijh", x.q, k)
    if options.softcap is not None:
        s = options.softcap * torch.tanh(s / options.softcap)
    c = 0.0 if x.sinks is None else (x.sinks.exp() if options.sink_form == "exp" else x.sinks).sum(-1)  # [Hq]
    e = s.exp() * seen
    mass = e.sum(2) + c
    o = torch.einsum("bijh,bjhv->bihv", e, v) / mass.unsqueeze(-1)
    return o, mass.log(), s.where(near, -torch.inf).amax(2)
