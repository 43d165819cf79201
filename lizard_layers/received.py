"""What a key received inside its window: the attention of later queries that its score may read.

With s_ij the logits of the window branch (the teacher's own: scale, softcap, RoPE), w window and n anchors, the weights
are a softmax over window and anchors alone, so that they depend neither on the keys that are kept, which scores
choose, nor on the linear branch::

    b_ij = exp(s_ij) / sum over i - w < l <= i and l < n of exp(s_il)

Only queries at the positions i with i % stride == stride - 1 count: by position in the sequence, so that padding,
packing and cutting a text into pieces change nothing. Per key head, over those with j + 2 <= i < j + w and over the
query heads of the key head::

    r_j = log sum b_ij,    log sum of those with i >= j + 3w/4,    log max b_ij        each at least log 1e-7

A key has received all by the time token j + w - 1 has come. Sums are taken key by key, without atomics, and so are the
same twice on a GPU. Shapes: N sequences in B rows of T tokens, W window, M sampled queries, Hq query and Hk key heads,
G = Hq / Hk, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_layers.config import LOOK_AHEAD, AttentionConfig
from lizard_layers.parameters import Float32Module, float32_parameter
from lizard_layers.token_order import TokenOrder, wide
from lizard_ops import ReceivedWeights

SUMS = 3  # sum, late sum and maximum
FACTS = 3 + SUMS  # beside the statistics of ``KeyScore``
NET_WIDTH = 32
LEAST = 1e-7
NUMBERS = 1 << 24  # of keys gathered at a time


class WindowForm(NamedTuple):
    """The window in which attention is received, and which of its queries count."""

    window: int
    anchors: int
    stride: int
    scale: float
    softcap: float | None = None

    @classmethod
    def of(cls, config: AttentionConfig) -> WindowForm:
        """That of a layer."""
        scale = config.head_dim**-0.5 if config.scale is None else config.scale
        return cls(config.window, config.anchors, config.score_stride, scale, config.softcap)


class InWindow(NamedTuple):
    """Queries and keys as the window branch sees them, after RoPE where it has one."""

    q: Tensor  # [B, T, Hq, D]
    k: Tensor  # [B, T, Hk, D]
    ring_k: Tensor | None = None  # [N, W, Hk, D] of earlier calls, position p in place p % W; None at the start
    anchor_k: Tensor | None = None  # [N, n, Hk, D] of earlier calls; None at the start or without anchors


class ReceivedTerm(Float32Module):
    """What the facts of a key add to its score, per key head h, with ``width`` inner units::

        t_jh = c_h . gelu(A_h (f_jh - m_h) / d_h + b_h)

    f are the statistics of ``KeyScore`` and those of what the key received. m and d, mean and deviation, are set by
    stage 0 from its first rows (``standardise``) and not learned: no gradient reaches them. They are parameters, so
    that whatever keeps parameters keeps them. c = 0 at the start. ``seed``: of A, a normal of variance 1 / facts.
    """

    def __init__(self, num_key_heads: int, facts: int = FACTS, width: int = NET_WIDTH, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.inner_weight = float32_parameter(num_key_heads, facts, width)
        self.inner_bias = float32_parameter(num_key_heads, width)
        self.outer_weight = float32_parameter(num_key_heads, width)
        self.mean, self.deviation = (float32_parameter(num_key_heads, facts) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            draw = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(self.inner_weight.shape, generator=draw, device="cpu", dtype=torch.float32)
            self.inner_weight.copy_(drawn * self.inner_weight.shape[1] ** -0.5)
            for tensor in (self.inner_bias, self.outer_weight, self.mean):
                tensor.zero_()
            self.deviation.fill_(1.0)

    def standardise(self, facts: Tensor) -> None:
        """Set mean and deviation to those of facts [n, Hk, F]; at least 0.01, for what does not vary here may later."""
        with torch.no_grad():
            self.mean.copy_(facts.mean(0))
            self.deviation.copy_(facts.std(0, correction=0).clamp(min=0.01))

    def weights(self) -> ReceivedWeights:
        """What an op of single tokens reads."""
        mean, deviation = self.mean.detach(), self.deviation.detach()
        return ReceivedWeights(mean, deviation, self.inner_weight, self.inner_bias, self.outer_weight)

    def forward(self, facts: Tensor) -> Tensor:
        """facts [B, T, Hk, F] -> [B, T, Hk]."""
        plain = (facts - self.mean.detach()) / self.deviation.detach()
        inner = F.gelu(torch.einsum("bthf,hfw->bthw", plain, self.inner_weight) + self.inner_bias)
        return (inner * self.outer_weight).sum(-1)


def facts_of(statistics: Tensor, sums: Tensor) -> Tensor:
    """What a ``ReceivedTerm`` reads, [..., 6], of statistics [..., 3] and received sums [..., 3]."""
    return torch.cat([statistics, sums.clamp(min=LEAST).log()], -1)


@torch.no_grad()
def attention_received(seen: InWindow, form: WindowForm, order: TokenOrder, position: Tensor) -> Received:
    """What the queries of a call give to keys of it and of earlier ones. position [N]: tokens of earlier calls."""
    positions = order.positions(position)
    q, k = order.arrange(seen.q), order.arrange(seen.k)
    (rows, length), stride = positions.shape, form.stride
    sampled = order.real() & (positions % stride == stride - 1)
    before = F.pad(sampled.cumsum(1), (1, 0))  # sampled tokens of the row before each place
    texts = 1 if order.ends is None else order.counts.shape[0]  # of a row
    most = length // stride + texts + 1  # one more than there can be, and so never one, which an export would ask for
    slots = torch.arange(1, most + 1, device=q.device).expand(rows, -1).contiguous()
    places = torch.searchsorted(before[:, 1:].contiguous(), slots)  # [B, M] of the sampled tokens, T behind the last
    given = (q, k, seen, form, order, positions)
    if torch.compiler.is_compiling():  # one graph for every length
        return Received(before, places, _weights(*given, places))
    block = max(NUMBERS // max(rows * (form.window + form.anchors) * k.shape[2] * k.shape[3], 1), 1)
    return Received(before, places, torch.cat([_weights(*given, part) for part in places.split(block, 1)], 1))


class Received(NamedTuple):
    """The weights of a call's sampled queries."""

    before: Tensor  # [B, T + 1] int64, sampled tokens of a row before each place
    places: Tensor  # [B, M] int64, of the sampled tokens
    weights: Tensor  # [B, M, W, Hk, 2], sum and maximum over the group, of the key d before a sampled token

    def collected(self, row: Tensor, key: Tensor, first: Tensor, last: Tensor, stride: int) -> Tensor:
        """Sum, late sum and maximum [R, L, Hk, 3] of what keys received from the tokens ``first`` to ``last``.

        row int64 [R, 1]; key [R or 1, L], the places of keys, below zero too; first, last the same, of their sequence.
        """
        most, window = self.weights.shape[1:3]
        length = self.before.shape[1] - 1
        low, high = torch.maximum(key + LOOK_AHEAD, first), torch.minimum(key + window - 1, last)
        slot = self.before[row, low.clamp(0, length)].unsqueeze(-1)
        slot = slot + torch.arange(-(-(window - LOOK_AHEAD) // stride), device=key.device)
        held = slot.clamp(max=most - 1)
        place = self.places[row.unsqueeze(-1), held]
        distance = place - key.unsqueeze(-1)
        there = (slot < most) & (place <= high.unsqueeze(-1)) & (place >= low.unsqueeze(-1))
        index = (row.unsqueeze(-1) * most + held) * window + distance.clamp(0, window - 1)
        found = self.weights.flatten(0, 2)[index].masked_fill(~wide(there, self.weights), 0.0)  # [R, L, S, Hk, 2]
        total, largest = found.unbind(-1)
        late = total.masked_fill(~wide(distance >= late_from(window), total), 0.0)
        return torch.stack([total.sum(2), late.sum(2), largest.amax(2)], -1)


def late_from(window: int) -> int:
    """The least distance of the last quarter of a window."""
    return window * 3 // 4


def _weights(
    q: Tensor, k: Tensor, seen: InWindow, form: WindowForm, order: TokenOrder, positions: Tensor, places: Tensor
) -> Tensor:
    """[B, m, W, Hk, 2] of the queries at ``places`` [B, m]: weights summed over the group, and the largest."""
    (batch, length, key_heads), (window, anchors) = k.shape[:3], form[:2]
    row = torch.arange(batch, device=k.device)[:, None]
    at = places.clamp(max=length - 1)
    position, rank = positions[row, at], order.rank.expand(batch, -1)[row, at]
    number = order.numbers().expand(batch, length)[row, at]
    here = row * length + at
    back = torch.arange(window, device=k.device)
    there = back <= position.unsqueeze(-1)  # [B, m, W]
    index = here.unsqueeze(-1) - torch.where(there, back, 0)
    banks, start = [k.flatten(0, 1)], batch * length
    if seen.ring_k is not None:
        old = start + number.unsqueeze(-1) * window + (position.unsqueeze(-1) - back) % window
        index = torch.where(there & (back > rank.unsqueeze(-1)), old, index)
        banks.append(seen.ring_k.flatten(0, 1).to(k.dtype))
        start = start + seen.ring_k.shape[0] * window
    if anchors:
        anchor = torch.arange(anchors, device=k.device)
        distance = position.unsqueeze(-1) - anchor
        outside = distance >= window
        anchor_index = here.unsqueeze(-1) - torch.where(outside, distance, 0)
        if seen.anchor_k is not None:
            old = start + number.unsqueeze(-1) * anchors + anchor
            anchor_index = torch.where(outside & (distance > rank.unsqueeze(-1)), old, anchor_index)
            banks.append(seen.anchor_k.flatten(0, 1).to(k.dtype))
        index, there = torch.cat([index, anchor_index], -1), torch.cat([there, outside], -1)
    bank = banks[0] if len(banks) == 1 else torch.cat(banks)  # [keys, Hk, D]
    heads = torch.arange(key_heads, device=k.device)[:, None, None]
    keys = bank.flatten(0, 1)[index.unsqueeze(1) * key_heads + heads]  # [B, Hk, m, W + n, D]
    queries = q[row, at].unflatten(2, (key_heads, -1)).transpose(1, 2)  # [B, Hk, m, G, D]
    shares = _shares(queries, keys, ~there[:, None, :, None], form)
    return torch.stack([t.permute(0, 2, 3, 1) for t in shares], -1)


def _shares(q: Tensor, k: Tensor, hidden: Tensor, form: WindowForm) -> tuple[Tensor, Tensor]:
    """q [..., G, D], k [..., L, D], hidden [..., 1, L] -> weights of the first W of L keys, [..., W].

    Summed over the group, and the largest.
    """
    work = work_dtype(q)
    logits = (q.to(work) * form.scale) @ k.to(work).transpose(-1, -2)
    shares = weights_of(logits, hidden, form)[..., : form.window]
    return shares.sum(-2), shares.amax(-2)


def weights_of(logits: Tensor, hidden: Tensor, form: WindowForm) -> Tensor:
    """Softmax of scaled logits over all keys that are not ``hidden``."""
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def work_dtype(x: Tensor) -> torch.dtype:
    """In which weights are formed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
