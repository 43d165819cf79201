"""The scores' step of one text on a CPU, whose position Python knows: what waits, joins and leaves is a slice here."""

from __future__ import annotations

import functools

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

    def step(
        self,
        position: int,
        sums: Tensor,  # [4 S], W_o x of o = -1, 0, 1, 2
        k: Tensor,  # [Hk, D] before RoPE
        v: Tensor,  # [Hk, V]
        weights: KeyScoreWeights,
        term: ReceivedWeights,
        scores: Tensor,  # [Hk, G, W + A], of the query with the keys of the window, in their places, and the anchors
    ) -> Tensor | None:
        """The score [Hk] of the key W - 1 tokens before, None where there is none. The state is overwritten."""
        slot, heads = position % self.window, k.shape[0]
        first, second, third, fourth = sums.view(4, -1).unbind()
        if position >= LOOK_AHEAD:
            inner = F.gelu((self.inner[0] + fourth).add_(weights.inner_bias))
            base = torch.addmv(self.linear[0] + weights.bias, weights.outer_weight, inner)
            self.ring[(position - LOOK_AHEAD) % self.window, :, STATISTICS] = base
        torch.add(self.inner[1], third, out=self.inner[0])
        torch.add(self.inner[2], second, out=self.inner[1])
        self.inner[2].copy_(first)

        norms = torch.linalg.vector_norm(torch.cat([k, v]), dim=-1).clamp_(min=LEAST_NORM)
        unit = k / norms[:heads].unsqueeze(1)
        mean = self.key_sum.add_(unit).to(k.dtype)
        likeness = (unit * mean).sum(-1) / torch.linalg.vector_norm(mean, dim=-1).clamp_(min=LEAST_NORM)
        new = self.ring[slot]
        new[:, STATISTICS:].zero_()
        statistics = new[:, :STATISTICS]
        torch.stack([*norms.log_().view(2, -1).unbind(), likeness], 1, out=statistics)
        self.linear[0].copy_(self.linear[1])
        torch.sum(statistics * weights.linear_weight, 1, out=self.linear[1])

        if (position + 1) % self.stride == 0:
            self._give(slot, scores.softmax(-1)[..., : self.window])
        if position < self.window - 1:
            return None
        left = self.ring[(position + 1) % self.window]
        return received_term_of(left, term).add_(left[:, STATISTICS])

    def _give(self, slot: int, shares: Tensor) -> None:
        """Add the shares [Hk, G, W] of a query that counts to what the keys of the window have received."""
        window = self.window
        masks = _counted(window, shares.dtype)[window - slot : 2 * window - slot]  # [W, 2]
        total, largest = shares.sum(1).t(), shares.amax(1).t()  # [W, Hk]
        self.received.addcmul_(total.unsqueeze(-1), masks.unsqueeze(1))
        torch.maximum(self.most, largest * masks[:, :1], out=self.most)


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
