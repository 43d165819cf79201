"""What keys receive in texts that are given from their start, without a gather: by bands of queries and keys.

The sampled queries of such texts stand at fixed places, stride - 1, 2 stride - 1 and so on, in every row. ``per`` of
them that follow each other are a block of P = per * stride positions; they see span = P - stride + w keys, of which
each sees the w on its band. So logits are one product of matrices a block, sums go over a block's queries, and what a
key received is its block's and the next one's. ``lizard_layers.received`` has the formula, and the form for everything
else: later pieces and packed rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_layers.config import LOOK_AHEAD
from lizard_layers.received import (
    InWindow,
    Received,
    WindowForm,
    attention_received,
    late_from,
    weights_of,
    work_dtype,
)
from lizard_layers.token_order import TokenOrder, wide

NUMBERS = 1 << 24  # logits held at a time


class FromStart(NamedTuple):
    """What each key of texts without earlier calls has received, [B, T, Hk, 3]."""

    sums: Tensor

    def collected(self, row: Tensor, key: Tensor, first: Tensor, last: Tensor, stride: int) -> Tensor:
        """As ``Received.collected``, where ``first`` to ``last`` are all tokens that there are, or all a key's."""
        found = self.sums[row, key.clamp(min=0)]
        return found.masked_fill(~wide(key >= 0, found), 0.0)


def received_by(seen: InWindow, form: WindowForm, order: TokenOrder, position: Tensor) -> FromStart | Received:
    """What the queries of a call give to keys of it and of earlier ones. position [N]: tokens of earlier calls, none
    where ``seen`` has no ring of them."""
    if seen.ring_k is None and order.ends is None:
        return received_from_start(seen, form, order)
    return attention_received(seen, form, order, position)


@torch.no_grad()
def received_from_start(seen: InWindow, form: WindowForm, order: TokenOrder) -> FromStart:
    """Of rows, padded or not, that nothing came before."""
    q, k = order.arrange(seen.q), order.arrange(seen.k)
    (batch, length, heads), (window, anchors, stride) = k.shape[:3], form[:3]
    per, count = max(window // stride, 1), length // stride
    block, blocks = per * stride, count // per + 1  # one more than may be needed, and so never none
    front = window - stride  # keys before position 0 that the first block's band has; below 0: first keys that none has
    span = block + front
    keys = F.pad(k, (0, 0, 0, 0, max(front, 0), blocks * block - length))[:, max(-front, 0) :].unfold(1, span, block)
    queries = F.pad(q[:, stride - 1 :: stride], (0, 0, 0, 0, 0, blocks * per - count))
    queries = queries.unflatten(1, (blocks, per)).unflatten(3, (heads, -1))
    anchor = F.pad(k[:, :anchors], (0, 0, 0, 0, 0, anchors))[:, :anchors].permute(0, 2, 3, 1).unsqueeze(2)
    at_once = max(NUMBERS // max(batch * q.shape[2] * per * (span + anchors), 1), 1)
    if torch.compiler.is_compiling():  # one graph for every length
        at_once = blocks
    numbers = torch.arange(blocks, device=k.device)
    each = zip(queries.split(at_once, 1), keys.split(at_once, 1), numbers.split(at_once), strict=True)
    parts = [_of_blocks(*given, anchor, form, order.counts) for given in each]
    own, after = F.pad(torch.cat(parts, 3), (0, 2 * block - span)).split(block, -1)
    own, after = F.pad(own, (0, 0, 0, 1)), F.pad(after, (0, 0, 1, 0))
    joined = torch.cat([own[:2] + after[:2], torch.maximum(own[2:], after[2:])]).flatten(3)
    sums = F.pad(joined, (max(-front, 0), 0))[..., max(front, 0) :][..., :length]
    return FromStart(sums.permute(1, 3, 2, 0))


def _of_blocks(
    queries: Tensor,  # [B, n, per, Hk, G, D]
    keys: Tensor,  # [B, n, Hk, D, span]
    number: Tensor,  # [n]
    anchor: Tensor,  # [B, Hk, 1, D, anchors]
    form: WindowForm,
    counts: Tensor,  # [B] tokens of each row
) -> Tensor:
    """[3, B, Hk, n, span]: sum, late sum and maximum that a block's queries give to the keys of its band."""
    (window, anchors, stride), (per, span) = form[:3], (queries.shape[2], keys.shape[-1])
    order = torch.arange(per, device=keys.device)
    band = torch.arange(span, device=keys.device)
    place = number[:, None] * (per * stride) + (order + 1) * stride - 1  # [n, per] of the queries
    distance = order[:, None] * stride + window - 1 - band  # [per, span]
    outside = (distance < 0) | (distance >= window)
    hidden = outside | (place.unsqueeze(-1) < distance)  # [n, per, span]
    far = place.unsqueeze(-1) - torch.arange(anchors, device=keys.device) < window  # the window has them, or nobody
    hidden = torch.cat([hidden, far], -1).unsqueeze(2)
    q = queries.permute(0, 3, 1, 2, 4, 5).to(work_dtype(keys)) * form.scale  # [B, Hk, n, per, G, D]
    k = keys.permute(0, 2, 1, 3, 4).to(q.dtype)
    logits = torch.cat([q.flatten(3, 4) @ k, q.flatten(3, 4) @ anchor.to(q.dtype)], -1)
    shares = weights_of(logits.unflatten(3, (per, -1)), hidden, form)[..., :span]
    real = place < counts[:, None, None]  # [B, n, per]
    counted = (real[..., None] & (distance >= LOOK_AHEAD))[:, None]  # [B, 1, n, per, span]
    late = counted & (distance >= late_from(window))
    total, largest = shares.sum(4).masked_fill(~counted, 0.0), shares.amax(4).masked_fill(~counted, 0.0)
    return torch.stack([total.sum(3), total.masked_fill(~late, 0.0).sum(3), largest.amax(3)])
