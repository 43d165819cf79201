"""Linear sums of a rank's keys, and of all ranks before one: an exclusive prefix of decayed sums.

With S_s what the keys that enter the sums in the part of rank s leave of themselves at its end, and D_s the log-decay
over that part, rank r begins with

    S = sum_{s < r} exp(D_{s+1} + ... + D_{r-1}) S_s

No exponential is of a positive number, and log scales take what one float does not hold, as in every other form.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lizard_ops.common.autocast import without_autocast
from lizard_ops.common.checks import work_dtype
from lizard_ops.common.features import expand_features, feature_dim
from lizard_ops.common.row_decays import Decays

NUMBERS = 1 << 24  # of features in memory at once


class PartSums(NamedTuple):
    """Sums of values and of ones beside them, to be multiplied by exp(log_scale)."""

    s: Tensor  # [..., B, Hs, F, V + 1]
    log_scale: Tensor | None  # [..., B, Hs] float64, no graph; None for zero

    def rounded(self) -> PartSums:
        """The same with a log scale in the dtype of the sums, which take what it loses."""
        if self.log_scale is None:
            return self
        log_scale = self.log_scale.to(self.s.dtype)
        rest = (self.log_scale - finite(log_scale).double()).masked_fill(log_scale == -math.inf, 0.0)
        return PartSums(self.s * rest.exp().to(self.s.dtype)[..., None, None], log_scale)


def sums_of(fk: Tensor, v: Tensor, log: Tensor, feature_map: str, logs: bool) -> PartSums:
    """Sums over keys, block after block, each recomputed in the backward: memory does not grow with the keys.

    fk [B, M, Hk, Fp] pre-activations, v [B, M, Hk, V]; log: log-decay of each key, float64, -inf for what is no key:
    [B, M, Hk, y, 1] with y query heads of a key head that have gates of their own, or [B, M, Hk, 1, F].
    """
    total: PartSums | None = None
    rows = max(NUMBERS // max(fk.shape[0] * fk.shape[2] * feature_dim(fk.shape[3], feature_map), 1), 1)
    for begin in range(0, max(fk.shape[1], 1), rows):
        at = slice(begin, begin + rows)
        new = PartSums(*_Block.apply(fk[:, at], v[:, at], log[:, at], feature_map, logs))
        total = new if total is None else added(total, new)
    assert total is not None
    return total


class _Block(torch.autograd.Function):
    """``_block``, which keeps its inputs alone for the backward."""

    @staticmethod
    def forward(
        ctx: Any, fk: Tensor, v: Tensor, log: Tensor, feature_map: str, logs: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(fk, v, log)
        ctx.choices = feature_map, logs
        s, top = _block(fk, v, log, feature_map, logs)
        if top is not None:
            ctx.mark_non_differentiable(top)
        return s, top

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_s: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        wanted = [n for n, need in enumerate(needs) if need]
        with torch.enable_grad(), without_autocast(d_s):
            inputs = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needs, strict=True)]
            s, _ = _block(*inputs, *ctx.choices)
            grads = dict(zip(wanted, torch.autograd.grad(s, [inputs[n] for n in wanted], d_s), strict=True))
        return *(grads.get(n) for n in range(3)), None, None


def _block(fk: Tensor, v: Tensor, log: Tensor, feature_map: str, logs: bool) -> tuple[Tensor, Tensor | None]:
    work = work_dtype(v)
    phi, key_log = expand_features(fk.to(work), feature_map)
    values = F.pad(v.to(work), (0, 1), value=1.0)
    if key_log is not None:
        log = log + key_log[..., None, None]
    top = None
    if logs:
        shape = log.shape[0], *log.shape[2:4]
        top = log.detach().amax((1, 4)) if log.shape[1] else log.new_full(shape, -math.inf)
        log = log - finite(top)[:, None, :, :, None]
    weight = log.to(work).exp()
    if weight.shape[3] == 1:
        keys = (phi * weight.squeeze(3)).transpose(1, 2)
        s = (keys.transpose(-1, -2) @ values.transpose(1, 2)).unsqueeze(2)
    else:
        weighted = (values.unsqueeze(3) * weight).transpose(1, 2)  # [B, Hk, m, y, E]
        s = phi.permute(0, 2, 3, 1) @ weighted.flatten(3, 4)
        s = s.unflatten(-1, weighted.shape[3:]).transpose(2, 3)
    return s.flatten(1, 2), None if top is None else top.flatten(1, 2)


def added(a: PartSums, b: PartSums) -> PartSums:
    """The sum of both."""
    if a.log_scale is None or b.log_scale is None:
        return PartSums(a.s + b.s, None)
    top = torch.maximum(a.log_scale, b.log_scale)
    left, right = ((x.log_scale - finite(top)).to(x.s.dtype).exp()[..., None, None] * x.s for x in (a, b))  # type: ignore[operator]
    return PartSums(left + right, top)


def prefix(parts: PartSums, passed: Tensor | None, rank: int) -> PartSums:
    """What the ranks before this one leave at its start; parts [R, B, Hs, ...].

    passed [R, B, Hs, 1 or F]: log-decay ``behind`` each part, None without a gate. What later ranks sent weighs
    nothing, also where it is NaN; every rank's result is a function of what all sent, so that every backward comes
    here.
    """
    ranks = parts.s.shape[0]
    earlier = (torch.arange(ranks, device=parts.s.device) < rank).view(-1, *[1] * (parts.s.ndim - 1))
    s = torch.where(earlier, parts.s, 0.0)
    log = parts.s.new_zeros(ranks, *parts.s.shape[1:3], 1, dtype=torch.float64)
    if passed is not None:
        log = log + passed
    top = None
    if parts.log_scale is not None:
        log = log + parts.log_scale.masked_fill(~earlier[..., 0, 0], -math.inf).unsqueeze(-1)
        top = log.detach().amax((0, 3))
        log = log - finite(top).unsqueeze(-1)
    weight = log.to(s.dtype).exp()
    return PartSums((weight.unsqueeze(-1) * s).sum(0), top)


def behind(decays: Tensor, rank: int) -> Tensor:
    """[R, ...] float64: log-decay from the end of each rank's part to the start of this one's; decays [R, ...]."""
    reset = decays == -math.inf
    sums = decays.double().masked_fill(reset, 0.0).cumsum(0)
    passed = Decays(sums, reset.long().cumsum(0))
    end = passed.of(lambda x: x[max(rank - 1, 0)])
    later = torch.arange(len(decays), device=decays.device) >= rank
    found = Decays(end.sums, end.resets).since(passed)
    return found.masked_fill(later.view(-1, *[1] * (decays.ndim - 1)), 0.0)


def finite(log: Tensor) -> Tensor:
    """A log scale of -inf belongs to sums of nothing."""
    return log.masked_fill(log == -math.inf, 0.0)
