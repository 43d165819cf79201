"""Keys in the order in which they enter the sums, where each has an expiry of its own, in plain PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.gated_attn.arguments import GatedInputs

LEAST = -1.0e6  # of a log-decay of one step that is no reset: more leaves nothing, and costs sums their last digits


class Entering(NamedTuple):
    """What becomes of the keys until the row at which they enter the sums."""

    decayed: Tensor  # [B, T, Hk or Hq] or [B, T, Hk, F] log decay of the row's key, float64; -inf where there is none
    left: Tensor | None  # [B, T, Hk or Hq] 0 where the row's query has a key that no reset came after, -inf where not


def in_order_of_expiry(inputs: GatedInputs, lengths: Tensor | None, anchors: int) -> tuple[GatedInputs, Entering]:
    """Right-padded rows without a state, their features and values gathered so that row i has the key that expires at
    i, and what became of it until then.

    At most one key of a head expires at a query: the one that leaves the window, or the one that it displaces.
    """
    k, v, g, expiry = inputs.k, inputs.v, inputs.g, inputs.expiry
    assert expiry is not None
    (batch, length, heads), device = expiry.shape, expiry.device
    row = torch.arange(length, device=device).view(1, -1, 1)
    is_key = row >= anchors if lengths is None else (row >= anchors) & (row < lengths.view(-1, 1, 1))
    at = torch.where(is_key & (expiry < length), expiry, length)
    source = expiry.new_full((batch, length + 1, heads), -1)  # the last row is nobody's
    source = source.scatter(1, at, row.expand_as(expiry))[:, :length]

    def per_head(index: Tensor, like: Tensor) -> Tensor:  # [B, T, Hk] -> that of like [B, T, Hk or Hq, ...]
        index = index.repeat_interleave(like.shape[2] // heads, 2)
        return index.view(*index.shape, *[1] * (like.ndim - 3))

    def gathered(x: Tensor) -> Tensor:
        return x.gather(1, per_head(source.clamp(min=0), x).expand_as(x))

    left = None
    if g is None:
        decayed = v.new_zeros(source.shape, dtype=torch.float64)
    else:
        g = g.expand(-1, -1, heads, *g.shape[3:]) if g.shape[2] == 1 else g
        resets = g == -math.inf
        sums, counts = g.double().masked_fill(resets, 0.0).clamp(min=LEAST).cumsum(1), resets.cumsum(1)
        decayed = (sums - gathered(sums)).masked_fill(counts > gathered(counts), -math.inf)
        if length:
            last = torch.where(resets, row.view(*row.shape, *[1] * (g.ndim - 3)), -1).cummax(1)[0]
            after = per_head(source.cummax(1)[0], g) >= last
            left = torch.where(after.any(-1) if g.ndim == 4 else after, 0.0, -math.inf).double()
    decayed = decayed.masked_fill(per_head(source, decayed) < 0, -math.inf)
    return inputs._replace(k=gathered(k), v=gathered(v), expiry=None), Entering(decayed, left)
