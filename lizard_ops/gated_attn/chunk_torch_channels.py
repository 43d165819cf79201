"""Gates per channel where keys have logs of their own: every channel has a shift of its own.

How much of a key is left is a number per channel, and with it which key weighs most. What is summed in a channel is
relative to its largest term, and a query's sum over channels to the largest product of both: the sum is of order 1
whichever channels hold it. A shift by the decay of the slowest channel would leave nothing of the others, and gradients
without bounds. Inside a call the sums of a channel keep their own log scale; the state's is one per head.

Axes as in ``chunk_torch_tiles``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.features import log_features
from lizard_ops.common.sizes import is_known
from lizard_ops.gated_attn.chunk_torch_tiles import RESET, Attended, Sums, decays_inside, finite, future_rows

LEAST = 1.0e-30  # a smaller feature weighs as one of this size where the largest term is looked for


class Factors(NamedTuple):
    """Features times exp(log), channel by channel."""

    features: Tensor | None  # None for ones
    log: Tensor | None  # float64, None for zeros; -inf where there is no key

    def plus(self, log: Tensor | None) -> Factors:
        """These, times the exponential of a log."""
        if log is None:
            return self
        return self._replace(log=log.double() if self.log is None else self.log + log)

    def unsqueeze(self, axis: int) -> Factors:
        """The same with another axis."""
        return Factors(*(None if x is None else x.unsqueeze(axis) for x in self))

    def size(self) -> Tensor:
        """Log of their size, float64, without a graph."""
        parts = [] if self.log is None else [self.log.detach()]
        if self.features is not None:
            parts.append(self.features.detach().abs().clamp(min=LEAST).double().log())
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def times(self, log: Tensor, dtype: torch.dtype) -> Tensor:
        """The numbers themselves, times the exponential of a log that keeps them within bounds."""
        weight = (log if self.log is None else self.log + log).to(dtype).exp()
        return weight if self.features is None else weight * self.features


def channel_factors(x: Tensor, feature_map: str) -> Factors:
    """Features of pre-activations [..., Fp]; those of the two-sided maps are known by their logs."""
    if feature_map == "identity":
        return Factors(x, None)
    return Factors(None, log_features(x, feature_map).double())


def key_factors(x: Tensor, feature_map: str, decayed: Tensor | None, absent: Tensor) -> tuple[Factors, Tensor]:
    """(features of keys [B, Hk, n, C, Fp], their logs in the state's log scale [B, Hk, n, C] float64).

    decayed [B, Hk, n, C, F]: log-decay of keys until their rows. absent [B or 1, 1, n, C]: True where there is no key.
    """
    k = channel_factors(x, feature_map)
    log = k.log.detach().amax(-1) if feature_map == "exp" and k.log is not None else x.new_zeros(x.shape[:-1])
    if decayed is not None:
        log = log + decayed.detach().amax(-1)
    k = k.plus(decayed)
    assert k.log is not None
    k = k._replace(log=k.log.masked_fill(absent.unsqueeze(-1), -math.inf))
    return k, log.double().masked_fill(absent, -math.inf)


def attend_channel_logs(
    q: Factors,  # [B, Hk, n, G, C, F]
    k: Factors,  # [B, Hk, n, C, F], with a log
    v: Tensor,  # [B, Hk, n, C, E]
    g: Tensor,  # [B, Hk, n, C, F]
    key_log: Tensor,  # [B, Hk, n, C] float64: the key's in the state's log scale
    start: Sums | None,
) -> Attended:
    """``attend_channel_gate`` for such keys; the shift is one per query head."""
    dtype, run = v.dtype, decays_inside(g, -2)
    future = future_rows(g.shape[3], g.device)
    pair = (run.unsqueeze(-2) - run.unsqueeze(-3)).masked_fill(future.unsqueeze(-1), -math.inf)  # [B,Hk,n,C,C,F]
    largest = (pair.detach() + k.size().unsqueeze(-3)).amax(-2)  # [B, Hk, n, C, F] of the keys in the chunk
    top = largest[..., -1, :]  # seen from the end of the chunk
    joins = k.times(run[..., -1:, :] - run - finite(top).unsqueeze(-2), dtype)
    items = joins.double().transpose(-1, -2) @ v.double()
    before, log_before, last, log_last = _scan(items, run[..., -1, :], top, start)

    from_start = run + log_before.unsqueeze(-2)
    largest = torch.maximum(largest, from_start.detach())
    shift = (q.size() + largest.unsqueeze(3)).amax(-1)  # [B, Hk, n, G, C]
    queries = q.times(largest.unsqueeze(3) - finite(shift).unsqueeze(-1), dtype)
    keys = k.unsqueeze(-3).times(pair - finite(largest).unsqueeze(-2), dtype)
    scores = (keys @ queries.movedim(3, -1)).movedim(-1, 3)  # [B, Hk, n, G, C, C]
    near = scores.flatten(3, 4) @ v
    passed = (from_start - finite(largest)).to(dtype).exp()
    far = (queries * passed.unsqueeze(3)).flatten(3, 4).double() @ before
    scale = _log_scale(g, key_log, start)
    last = (last * (log_last - finite(scale)).exp().unsqueeze(-1)).to(dtype)
    return Attended((near + far).unflatten(3, shift.shape[3:]), shift, Sums(last.unsqueeze(2), scale))


def _log_scale(g: Tensor, key_log: Tensor, start: Sums | None) -> Tensor:
    """[B, Hk, 1] of the state after all chunks: the largest key log, each after the decay of the slowest channel."""
    slowest = g.detach().double().amax(-1).clamp(min=RESET).flatten(2)  # [B, Hk, n C]
    since = slowest.flip(-1).cumsum(-1).flip(-1)  # from each row on: no sum holds a reset before it
    behind = torch.cat([since[..., 1:], torch.zeros_like(since[..., :1])], -1)
    scale = (key_log.detach().flatten(2) + behind).amax(-1, keepdim=True)
    if start is None or start.log_scale is None:
        return scale
    return torch.maximum(scale, start.log_scale + since[..., :1])


def _scan(items: Tensor, decay: Tensor, top: Tensor, start: Sums | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums before every chunk [B, Hk, n, F, E] and their logs [B, Hk, n, F], and both after the last, all float64.

    The terms of a key's gradient cancel where it has all the mass: no rounding of many chunks may add to what is left.
    items [B, Hk, n, F, E] times exp(top [B, Hk, n, F]) join the sums after they decay by exp(decay [B, Hk, n, F]).
    """
    if start is None:
        carry, log = torch.zeros_like(items[:, :, 0]), torch.full_like(top[:, :, 0], -math.inf)
    else:
        assert start.log_scale is not None
        size = start.s.detach().squeeze(2).abs().amax(-1).clamp(min=LEAST)
        carry, log = start.s.squeeze(2).double() / size.unsqueeze(-1), start.log_scale + size.double().log()
    if not is_known(items.shape[2]):  # no loop has so many turns
        sums, logs = _linked(items, decay, top, carry, log)
        sums, logs = torch.cat([carry.unsqueeze(2), sums], 2), torch.cat([log.unsqueeze(2), logs], 2)
        return sums[:, :, :-1], logs[:, :, :-1], sums[:, :, -1], logs[:, :, -1]
    sums_before, logs_before = [], []
    for c in range(items.shape[2]):
        sums_before.append(carry)
        logs_before.append(log)
        left = decay[:, :, c] + log
        log = torch.maximum(left.detach(), top[:, :, c])
        kept, joins = ((x - finite(log)).exp().unsqueeze(-1) for x in (left, top[:, :, c]))
        carry = kept * carry + joins * items[:, :, c]
    return torch.stack(sums_before, 2), torch.stack(logs_before, 2), carry, log


def _linked(items: Tensor, decay: Tensor, top: Tensor, carry: Tensor, carry_log: Tensor) -> tuple[Tensor, Tensor]:
    """What the loop over chunks gives, after each of them, by a product of [n, n + 1] a channel."""
    run = decay.cumsum(2)
    log = run.unsqueeze(3) - run.unsqueeze(2) + top.unsqueeze(2)  # [B, Hk, n, n, F]
    log = log.masked_fill(future_rows(run.shape[2], log.device).unsqueeze(-1), -math.inf)
    log = torch.cat([(run + carry_log.unsqueeze(2)).unsqueeze(3), log], 3)
    logs = log.detach().amax(3)
    weights = (log - finite(logs).unsqueeze(3)).exp().movedim(4, 2)  # [B, Hk, F, n, n + 1]
    joined = torch.cat([carry.unsqueeze(2), items], 2).movedim(3, 2)  # [B, Hk, F, n + 1, E]
    return (weights @ joined).movedim(2, 3), logs
