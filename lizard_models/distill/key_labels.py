"""What a score of keys learns to foretell: how much the teacher's later queries would lose without each key.

Shapes: B rows, T positions, Hq query heads, Hk key heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops import without_autocast

LEAST = 1e-12  # labels end at its logarithm: below it a key is not missed, and float32 has no squares of less


class TeacherAttention(NamedTuple):
    """One layer's softmax attention, all that its labels are made of."""

    q: Tensor  # [B, T, Hq, D] after RoPE
    k: Tensor  # [B, T, Hk, D] after RoPE
    v: Tensor  # [B, T, Hk, Dv]
    output_weight: Tensor  # [hidden, Hq Dv], of the output projection
    scale: float  # of the scores
    softcap: float | None = None  # bound of the scores
    sliding_window: int | None = None  # keys that a query sees, its own included; None: all
    output_bias: Tensor | None = None  # [hidden]


@torch.no_grad()
def key_labels(
    attention: TeacherAttention, window: int, kind: str = "output", block: int = 1024, queries: int = 1
) -> Tensor:
    """How much later queries need each key: per key head, the logarithm of what is lost without it.

    With a_ij^h the teacher's attention of query i to key j in query head h, W_o^h the columns of the output projection
    for that head and o_i the layer's output after it, over the queries i >= j + ``window`` and the query heads h of the
    key head::

        "output"       l_j = 1/2 log mean_i sum_h (a_ij^h |W_o^h v_j| / |o_i|)^2   the relative error of dropping key j
        "attention"    l_j = log max_{i, h} a_ij^h

    with each mean's root and each maximum at least 1e-12. A mean, because a sum would say of the keys at a row's end,
    which fewer queries can need, that they are needed less. Keys with fewer than ``queries`` later queries get NaN.
    Rows are whole texts without padding. Computed in float32 on the device of q, ``block`` queries at a time: attention
    matrices [B, Hq, block, T] exist for one block only.

    Returns labels [B, T, Hk] float32, without gradients. Raises ValueError for another ``kind``, a window, block or
    queries below 1, or shapes that do not belong together.
    """
    q, k, v = (t.float() for t in attention[:3])
    _check(attention, kind, window=window, block=block, queries=queries)
    (batch, length, heads, _), key_heads = q.shape, k.shape[2]
    labels = q.new_full((batch, length, key_heads), torch.nan)
    keys = length - window  # those with a later query
    if keys < 1:
        return labels
    weight = attention.output_weight.float()
    bias = None if attention.output_bias is None else attention.output_bias.float()
    group = heads // key_heads
    grouped = q.unflatten(2, (key_heads, group)).permute(0, 2, 3, 1, 4).contiguous()  # [B, Hk, G, T, D]
    columns, values = k.permute(0, 2, 3, 1).contiguous(), v.transpose(1, 2).contiguous()
    found = q.new_zeros(batch, key_heads, group, keys)
    with without_autocast(q):
        for start in range(0, length, block):
            stop = min(start + block, length)
            seen = stop - window  # keys that these queries see after they left
            if seen < 1:
                continue
            a = _softmax(attention, grouped[..., start:stop, :], columns[..., :stop], start)
            later = a[..., :seen].tril(start - window)
            if kind == "attention":
                found[..., :seen] = torch.maximum(found[..., :seen], later.amax(-2))
                continue
            heard = (a.flatten(2, 3) @ values[:, :, :stop]).unflatten(2, (group, -1))  # [B, Hk, G, i, Dv]
            o = F.linear(heard.permute(0, 3, 1, 2, 4).flatten(2), weight, bias)
            shares = o.square().sum(-1).clamp_(min=LEAST**2).reciprocal_()  # [B, i]
            found[..., :seen] += (shares[:, None, None, None] @ later.square_()).squeeze(-2)
        if kind == "attention":
            lost = found.amax(2).clamp(min=LEAST).log()
        else:
            later_queries = torch.arange(keys, 0, -1, device=q.device)
            lost = (found * _output_squares(v[:, :keys], weight, heads)).sum(2) / later_queries
            lost = lost.clamp(min=LEAST**2).log() / 2
    counted = max(keys + 1 - queries, 0)
    labels[:, :counted] = lost.transpose(1, 2)[:, :counted]
    return labels


def teacher_weights(attention: TeacherAttention, q: Tensor, k: Tensor, start: int) -> Tensor:
    """a [B, Hk, G, i, j] of the queries ``start`` to ``start`` + i and the keys from the first on."""
    grouped = q.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)
    return _softmax(attention, grouped, k.permute(0, 2, 3, 1), start)


def _softmax(attention: TeacherAttention, grouped: Tensor, columns: Tensor, start: int) -> Tensor:
    """``teacher_weights`` of grouped queries [B, Hk, G, i, D] and columns of keys [B, Hk, D, j]: few launches, because
    a stage 0 makes them for every layer and block of its rows."""
    scores = ((grouped.flatten(2, 3) * attention.scale) @ columns).unflatten(2, grouped.shape[2:4])
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    queries = torch.arange(start, start + grouped.shape[3], device=scores.device)[:, None]
    keys = torch.arange(columns.shape[3], device=scores.device)
    hidden = keys > queries
    if attention.sliding_window is not None:
        hidden |= queries - keys >= attention.sliding_window
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1)


def _output_squares(v: Tensor, weight: Tensor, heads: int) -> Tensor:
    """|W_o^h v_j|^2 [B, Hk, G, j], one query head at a time."""
    key_heads, group = v.shape[2], heads // v.shape[2]
    parts = weight.unflatten(1, (heads, -1)).unbind(1)  # [hidden, Dv] each
    squares = [F.linear(v[:, :, h // group], parts[h]).square().sum(-1) for h in range(heads)]
    return torch.stack(squares, 1).unflatten(1, (key_heads, group))


def _check(attention: TeacherAttention, kind: str, **counts: int) -> None:
    if kind not in ("output", "attention"):
        raise ValueError(f"kind must be 'output' or 'attention', got {kind!r}")
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    q, k, v, weight = attention[:4]
    batch, length, heads, dim = q.shape
    if k.shape[2] < 1 or heads % k.shape[2] or k.shape != (batch, length, k.shape[2], dim):
        raise ValueError(
            f"k has shape {tuple(k.shape)}, wanted ({batch}, {length}, a divisor of {heads}, {dim}) beside q"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}, wanted {tuple(k.shape[:3])} and any dim")
    if weight.ndim != 2 or weight.shape[1] != heads * v.shape[3]:
        raise ValueError(f"output_weight has shape {tuple(weight.shape)}, wanted (hidden, {heads * v.shape[3]})")
