"""The scores' step of one text on a CPU, whose position Python knows: what waits, joins and leaves is a slice here."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.key_score.arguments import (
    LEAST_NORM,
    LEAST_RECEIVED,
    LOOK_AHEAD,
    STATISTICS,
    KeyScoreState,
    KeyScoreWeights,
    ReceivedWeights,
)


class _Slot(NamedTuple):
    """Views of a place of the ring."""

    whole: Tensor  # [Hk, 7]
    statistics: Tensor  # [Hk, 3]
    base: Tensor  # [Hk]
    others: Tensor  # [Hk, 4], what is not yet known of a new key


class OneTextScore:
    """A state of one row and its parts as a step reads and writes them: ``key_score_step`` with ``received``.

    Hk key heads, S inner units, W window.
    """

    def __init__(self, state: KeyScoreState, stride: int) -> None:
        assert state.ring is not None
        self.stride, self.window = stride, state.ring.shape[1]
        with torch.inference_mode(state.ring.is_inference()), torch.no_grad():
            self.inner, self.linear = state.inner[0].unbind(), state.linear[0].unbind()
            self.key_sum, self.ring = state.key_sum[0], state.ring[0]
            self.received, self.most = self.ring[..., STATISTICS + 1 : STATISTICS + 3], self.ring[..., -1]
            self.slots: list[_Slot | None] = [None] * self.window

    def slot(self, position: int) -> _Slot:
        """The place of the key at ``position``."""
        place = position % self.window
        found = self.slots[place]
        if found is None:
            with torch.inference_mode(self.ring.is_inference()), torch.no_grad():
                whole = self.ring[place]
                first, others = whole[:, :STATISTICS], whole[:, STATISTICS:]
                found = self.slots[place] = _Slot(whole, first, others[:, 0], others)
        return found

    def step(
        self,
        position: int,
        sums: Tensor,  # [4 S], W_o x of o = -1, 0, 1, 2
        k: Tensor,  # [Hk, D] before RoPE
        v: Tensor,  # [Hk, V]
        weights: KeyScoreWeights,
        term: ReceivedWeights,
        scores: Tensor,  # [Hk, G, M], of the query with the window's keys in their places, then with anchors
    ) -> Tensor | None:
        """The score [Hk] of the key W - 1 tokens before, None where there is none. The state is overwritten."""
        heads = k.shape[0]
        first, second, third, fourth = sums.view(4, -1).unbind()
        if position >= LOOK_AHEAD:
            inner = F.gelu((self.inner[0] + fourth).add_(weights.inner_bias))
            base = torch.addmv(self.linear[0] + weights.bias, weights.outer_weight, inner)
            self.slot(position - LOOK_AHEAD).base.copy_(base)
        torch.add(self.inner[1], third, out=self.inner[0])
        torch.add(self.inner[2], second, out=self.inner[1])
        self.inner[2].copy_(first)

        norms = torch.linalg.vector_norm(torch.cat([k, v]), dim=-1).clamp_(min=LEAST_NORM)
        unit = k / norms[:heads].unsqueeze(1)
        mean = self.key_sum.add_(unit).to(k.dtype)
        likeness = (unit * mean).sum(-1) / torch.linalg.vector_norm(mean, dim=-1).clamp_(min=LEAST_NORM)
        new = self.slot(position)
        new.others.zero_()
        torch.stack([*norms.log_().view(2, -1).unbind(), likeness], 1, out=new.statistics)
        self.linear[0].copy_(self.linear[1])
        torch.sum(new.statistics * weights.linear_weight, 1, out=self.linear[1])

        if (position + 1) % self.stride == 0:
            self._give(position % self.window, scores.softmax(-1)[..., : self.window])
        if position < self.window - 1:
            return None
        left = self.slot(position + 1)
        return received_term_of(left.whole, term).add_(left.base)

    def _give(self, slot: int, shares: Tensor) -> None:
        """Add the shares [Hk, G, M] of a query that counts to what the M keys of the window have received."""
        window, seen = self.window, shares.shape[2]
        masks = _counted(window, shares.dtype)[window - slot : window - slot + seen]  # [M, 2]
        total, largest = shares.sum(1).t(), shares.amax(1).t()  # [M, Hk]
        self.received[:seen].addcmul_(total.unsqueeze(-1), masks.unsqueeze(1))
        most = self.most[:seen]
        torch.maximum(most, largest * masks[:, :1], out=most)


@functools.cache
def _counted(window: int, dtype: torch.dtype) -> Tensor:
    """[2 W, 2], whether a key counts, and whether late, in the place i - W behind that of the newest: 1 or 0."""
    with torch.inference_mode(False):
        distance = (-torch.arange(2 * window)) % window  # tokens since the key; 0: the newest itself
        return torch.stack([distance >= LOOK_AHEAD, distance >= window * 3 // 4], 1).to(dtype)


def received_term_of(left: Tensor, weights: ReceivedWeights) -> Tensor:
    """[Hk] of the seven numbers [Hk, 7] of a key that has received all."""
    facts = torch.cat([left[:, :STATISTICS], left[:, STATISTICS + 1 :].clamp(min=LEAST_RECEIVED).log_()], 1)
    facts = facts.sub_(weights.mean).div_(weights.deviation).unsqueeze(1)
    inner = F.gelu(torch.baddbmm(weights.inner_bias.unsqueeze(1), facts, weights.inner_weight))
    return (inner.squeeze(1) * weights.outer_weight).sum(-1)
