"""Kept keys over ranks: the best of a union are the best of the best of its parts.

A rank sends the best keys of those that leave the window in its part; the best of all that earlier ranks sent are what
one rank would have kept. What a rank does not send is expired wherever the sequence goes on, and is in its sums; what
it sends and others displace enters the sums of whoever is behind both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common.places import beyond, most
from lizard_ops.common.streams import gather_rows, per_head
from lizard_ops.context_parallel.part import PartOptions, Sent
from lizard_ops.key_expiry.arguments import NEVER
from lizard_ops.key_expiry.stream import LOWEST, number_of, ranks_of, score_of


class Best(NamedTuple):
    """The best keys of every head, best first."""

    ranks: Tensor  # [B, P, Hk] int64, with positions for numbers; LOWEST in empty places
    rows: Tensor  # [B, P, Hk] where they are among what was chosen from, -1 in empty places


def best_of(ranks: Tensor, options: PartOptions) -> Best:
    """Of the keys of these ranks [B, M, Hk], LOWEST for what is none."""
    count = most(options.places)
    ranks = torch.cat([ranks, ranks.new_full((ranks.shape[0], count, ranks.shape[2]), LOWEST)], 1)
    best, rows = ranks.topk(count, 1)
    none = best == LOWEST
    if isinstance(options.places, tuple):
        none = none | beyond(options.places, ranks.device)
    return Best(best.masked_fill(none, LOWEST), rows.masked_fill(none, -1))


def is_in(best: Best, rows: int) -> Tensor:
    """[B, M, Hk] bool: which of ``rows`` rows are among the best."""
    batch, _, heads = best.rows.shape
    chosen = torch.zeros(batch, rows + 1, heads, dtype=torch.bool, device=best.rows.device)
    return chosen.scatter(1, torch.where(best.rows < 0, rows, best.rows), True)[:, :rows]


def ranked(scores: Tensor, position: Tensor, is_key: Tensor) -> Tensor:
    """Ranks [B, M, Hk] of keys with these scores, at these positions [B, M]; LOWEST for what is no key."""
    return ranks_of(scores, position.clamp(min=0).unsqueeze(-1)).masked_fill(~is_key, LOWEST)


def sent_keys(best: Best, k: Tensor, v: Tensor, fk: Tensor | None, decays: Tensor | None) -> Sent:
    """What others need of them; k, v, fk and decays [B, M, H, ...] are of the keys that they were chosen from."""
    fields = {"k": k, "v": v, "fk": fk, "g": decays}
    return {"best": best.ranks} | {
        f"best_{name}": gather_rows(x, best.rows) for name, x in fields.items() if x is not None
    }


def kept_fields(sent: Sent, earlier: Tensor, options: PartOptions) -> tuple[dict[str, Tensor], Tensor]:
    """(fields of the state, [B, R P, Hk] which of all keys that earlier ranks sent are displaced).

    sent [R, B, P, Hk, ...], ``best_g`` decayed up to here; earlier [R].
    """
    there = earlier.view(-1, 1, 1, 1)
    every = one_list(torch.where(there, sent["best"], LOWEST))
    best = best_of(every, options)
    displaced = (every != LOWEST) & ~is_in(best, every.shape[1])
    position, order = torch.where(best.rows < 0, NEVER, number_of(best.ranks)).sort(1)
    rows, ranks = best.rows.gather(1, order), best.ranks.gather(1, order)
    empty = rows < 0
    fields = {
        "kept_scores": score_of(ranks).masked_fill(empty, -torch.inf),
        "kept_positions": position.masked_fill(empty, -1),
    }
    for name in ("k", "v", "fk", "g"):
        if f"best_{name}" in sent:
            x = gather_rows(one_list(sent[f"best_{name}"]), rows)
            fields[f"kept_{name}"] = x.masked_fill(per_head(empty, x), 0.0)
    return fields, displaced


def one_list(x: Tensor) -> Tensor:
    """[B, R P, Hk, ...] of [R, B, P, Hk, ...]."""
    return x.transpose(0, 1).flatten(1, 2)
