"""Gated linear attention as dense tiles in plain PyTorch, for keys that meet the query of their own row.

Log-decays are summed and subtracted in float64, so that a decay inside a chunk is exact whatever stood before it; only
exponentials of differences return to the work dtype. Weights are relative to a row shift, the running maximum of the
keys' log offsets and their decay (0 without log offsets), so none exceeds 1.

Axes: B rows, Hk key heads, n chunks, G query heads per key head, C positions per chunk, F features, E = V + 1 for the
values and a column of ones, whose sum is the mass; h is 1 or Hk and y is 1 or G, as the gate has it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.checks import refuse, want_values
from lizard_ops.common.sizes import is_known

RESET = -1.0e6  # stands for a log-decay of -inf: its exponential is 0, and float64 sums with it stay exact enough
SCAN = 32  # chunks whose states one matrix product links


class Sums(NamedTuple):
    """Linear sums, to be multiplied by exp(log_scale)."""

    s: Tensor  # [B, Hk, y, F, E]
    log_scale: Tensor | None  # [B, Hk, y] float64, None for zero


class Attended(NamedTuple):
    """What the tiles give, to be multiplied by exp(shift)."""

    values: Tensor  # [B, Hk, n, G, C, E]
    shift: Tensor | None  # [B, Hk, n, y, C] float64, None for zero
    final: Sums


def attend_head_gate(
    q: Tensor,  # [B, Hk, n, G, C, F]
    k: Tensor,  # [B, Hk, n, C, F]
    v: Tensor,  # [B, Hk, n, C, E]
    g: Tensor | None,  # [B, h, n, y, C]
    key_log: Tensor | None,  # [B, Hk, n, 1, C] float64, -inf where there is no key
    start: Sums | None,
    absorbed: bool,
) -> Attended:
    """One gate per head or for all, or none: decay tiles over score tiles, one state per chunk."""
    group, size = q.shape[3:5]
    run = q.new_zeros(1, 1, 1, 1, size, dtype=torch.float64) if g is None else decays_inside(g, -1)
    key = -run if key_log is None else key_log - run  # log weight of a key, seen from before the chunk
    pair = (run.unsqueeze(-1) + key.unsqueeze(-2)).masked_fill(future_rows(size, q.device), -math.inf)  # [B,h,n,y,C,C]
    log_end = run[..., -1:] + key
    top = None if key_log is None else log_end.detach().amax(-1)  # [B, Hk, n, y]
    weight = _exp(log_end, top, v.dtype).unsqueeze(-1)
    if weight.shape[3] == 1:
        items = (k.transpose(-1, -2) @ (v * weight.squeeze(3))).unsqueeze(2)  # [B, Hk, 1, n, F, E]
    else:
        weighted = (v.unsqueeze(3) * weight).movedim(3, 4)  # [B, Hk, n, C, G, E]
        items = (k.transpose(-1, -2) @ weighted.flatten(4, 5)).unflatten(-1, weighted.shape[4:]).movedim(4, 2)
    decay = run[..., -1].transpose(2, 3).expand(-1, -1, -1, items.shape[3])
    before, final = _scan_head_gate(items, decay, None if top is None else top.transpose(2, 3), start)

    shift, from_start = None, run
    if before.log_scale is not None:
        from_start = run + before.log_scale.transpose(2, 3).unsqueeze(-1)
        shift = torch.maximum(pair.amax(-1), from_start).detach()
    if absorbed:
        scores = _absorbed_scores(q, k, run, key, shift)
    else:
        scores = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, (group, size)) * _exp(pair, shift, q.dtype)
    near = scores.flatten(3, 4) @ v
    if before.s.shape[2] == 1:
        far = q.flatten(3, 4) @ before.s.squeeze(2)
    else:
        far = (q @ before.s.transpose(2, 3)).flatten(3, 4)
    far = far.unflatten(3, (group, size)) * _exp(from_start, shift, q.dtype, 0).unsqueeze(-1)
    return Attended(near.unflatten(3, (group, size)) + far, shift, final)


def attend_channel_gate(
    q: Tensor,  # [B, Hk, n, G, C, F]
    k: Tensor,  # [B, Hk, n, C, F]
    v: Tensor,  # [B, Hk, n, C, E]
    g: Tensor,  # [B, Hk, n, C, F]
    start: Sums | None,
) -> Attended:
    """One gate per channel: every pair of a (short) chunk has its own decays, which enter the dot product.

    For keys without logs: see ``chunk_torch_channels`` for others.
    """
    group, size = q.shape[3:5]
    run = decays_inside(g, -2)
    pair = run.unsqueeze(-2) - run.unsqueeze(-3)  # [B, Hk, n, C, C, F]
    pair = pair.masked_fill(future_rows(size, q.device).unsqueeze(-1), -math.inf)
    items = (k * _exp(run[..., -1:, :] - run, None, k.dtype)).transpose(-1, -2) @ v  # [B, Hk, n, F, E]
    before, final = _scan_channel_gate(items, run[..., -1, :], start)
    keys = _exp(pair, None, k.dtype) * k.unsqueeze(-3)
    scores = (keys @ q.movedim(3, -1)).movedim(-1, 3)  # [B, Hk, n, G, C, C]
    near = scores.flatten(3, 4) @ v
    far = (q * _exp(run, None, q.dtype).unsqueeze(3)).flatten(3, 4) @ before.s.squeeze(2)
    return Attended((near + far).unflatten(3, (group, size)), None, final)


def decays_inside(g: Tensor, dim: int) -> Tensor:
    """Log-decay from before the chunk, summed along its positions."""
    return g.double().clamp(min=RESET).cumsum(dim)


def future_rows(size: int, device: torch.device) -> Tensor:
    """[C, C], True where the key comes after the query."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def _exp(log: Tensor, shift: Tensor | None, dtype: torch.dtype, axes: int = 1) -> Tensor:
    """exp(log - shift) in dtype; shift lacks the last ``axes`` axes of log, and counts as 0 where it is -inf."""
    if shift is not None:
        log = log - finite(shift).view(*shift.shape, *[1] * axes)
    return log.to(dtype).exp()


def finite(shift: Tensor) -> Tensor:
    """A shift of -inf belongs to a mass of 0, which any other shift leaves as it is."""
    return shift.masked_fill(shift == -math.inf, 0.0)


def _absorbed_scores(q: Tensor, k: Tensor, run: Tensor, key: Tensor, shift: Tensor | None) -> Tensor:
    """Score tiles with the gate products moved into the features (section 4 of the paper), [B, Hk, n, G, C, C]."""
    top = finite(key.amax(-1, keepdim=True))
    low = key.masked_fill(key == -math.inf, math.inf).amin(-1, keepdim=True)
    want_values("g", run, 'gate_form="absorbed"')
    bound, span = (700.0 if q.dtype == torch.float64 else 80.0), float((top - low).detach().max())
    if span >= bound:
        refuse("gate_form", "absorbed", f'"stable": log-decays of a chunk span {span:.1f}, and {bound} is the bound')
    query = q * _exp(run + top, shift, q.dtype, 0).unsqueeze(-1)
    keys = k.unsqueeze(3) * _exp(key - top, None, k.dtype).unsqueeze(-1)  # [B, Hk, n, y, C, F]
    if keys.shape[3] == 1:
        return (query.flatten(3, 4) @ keys.squeeze(3).transpose(-1, -2)).unflatten(3, q.shape[3:5]).tril()
    return (query @ keys.transpose(-1, -2)).tril()


def _scan_head_gate(items: Tensor, decay: Tensor, top: Tensor | None, start: Sums | None) -> tuple[Sums, Sums]:
    """Sums before every chunk [B, Hk, y, n, F, E] and after the last, a matrix product for every ``SCAN`` chunks.

    items [B, Hk, y, n, F, E] times exp(top [B, Hk, y, n]) join the sums after they decay by exp(decay [B, h, y, n]).
    """
    carry, carry_log = (None, None) if start is None else (start.s.unsqueeze(3), start.log_scale)
    if not is_known(items.shape[3]):  # no loop has so many turns: all chunks at once
        return _shifted(*_linked_chunks(items, decay, top, carry, carry_log), start)
    sums, scales = [], []
    for begin in range(0, items.shape[3], SCAN):
        at = slice(begin, begin + SCAN)
        joined, highest = items[..., at, :, :], None if top is None else top[..., at]
        after, scale = _linked_chunks(joined, decay[..., at], highest, carry, carry_log)
        sums.append(after)
        carry = after[..., -1:, :, :]
        if scale is not None:
            scales.append(scale)
            carry_log = scale[..., -1]
    return _shifted(torch.cat(sums, 3), torch.cat(scales, 3) if scales else None, start)


def _linked_chunks(
    items: Tensor, decay: Tensor, top: Tensor | None, carry: Tensor | None, carry_log: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(sums [B, Hk, y, m, F, E] after every chunk, their log scale [B, Hk, y, m]) by one product of [m, m + 1]."""
    run, joined = decay.cumsum(-1), items
    log = run.unsqueeze(-1) - run.unsqueeze(-2)  # [B, h, y, m, m], from chunk to chunk
    log = log if top is None else log + top.unsqueeze(-2)
    log = log.masked_fill(future_rows(run.shape[-1], log.device), -math.inf)
    if carry is not None:
        first = run if carry_log is None else run + carry_log.unsqueeze(-1)
        log, joined = torch.cat([first.unsqueeze(-1), log], -1), torch.cat([carry, joined], 3)
    scale = None if top is None else log.detach().amax(-1)
    return (_exp(log, scale, items.dtype) @ joined.flatten(4, 5)).unflatten(-1, items.shape[4:]), scale


def _scan_channel_gate(items: Tensor, decay: Tensor, start: Sums | None) -> tuple[Sums, Sums]:
    """The same for items [B, Hk, n, F, E] and a decay [B, Hk, n, F] per channel, chunk after chunk."""
    if not is_known(items.shape[2]):
        return _shifted(_linked_channel_chunks(items, decay, start), None, start)
    carry = torch.zeros_like(items[:, :, 0]) if start is None else start.s.squeeze(2)
    sums = []
    for c in range(items.shape[2]):
        carry = _exp(decay[:, :, c], None, items.dtype).unsqueeze(-1) * carry + items[:, :, c]
        sums.append(carry)
    return _shifted(torch.stack(sums, 2).unsqueeze(2), None, start)


def _linked_channel_chunks(items: Tensor, decay: Tensor, start: Sums | None) -> Tensor:
    """What the loop over chunks gives, [B, Hk, 1, n, F, E], by a product of [n, n + 1] a channel."""
    run = decay.cumsum(2)
    log = run.unsqueeze(3) - run.unsqueeze(2)  # [B, Hk, n, n, F]
    log = log.masked_fill(future_rows(run.shape[2], log.device).unsqueeze(-1), -math.inf)
    first = torch.zeros_like(items[:, :, :1]) if start is None else start.s
    weights = _exp(torch.cat([run.unsqueeze(3), log], 3), None, items.dtype)  # [B, Hk, n, n + 1, F]
    joined = torch.cat([first, items], 2).movedim(3, 2)  # [B, Hk, F, n + 1, E]
    return (weights.movedim(4, 2) @ joined).movedim(2, 3).unsqueeze(2)  # [B, Hk, 1, n, F, E]


def _shifted(after: Tensor, log_after: Tensor | None, start: Sums | None) -> tuple[Sums, Sums]:
    """Turn the sums after every chunk into those before every chunk, and those after the last."""
    first = torch.zeros_like(after[:, :, :, :1]) if start is None else start.s.unsqueeze(3)
    before, final = torch.cat([first, after[:, :, :, :-1]], 3), after[:, :, :, -1]
    if log_after is None:
        return Sums(before, None), Sums(final, None)
    no_log = torch.full_like(log_after[..., :1], -math.inf)
    first_log = no_log if start is None or start.log_scale is None else start.log_scale.unsqueeze(-1)
    return Sums(before, torch.cat([first_log, log_after[..., :-1]], -1)), Sums(final, log_after[..., -1])
