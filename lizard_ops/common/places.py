"""Places of kept keys: as many for every key head, or a number of its own for each.

Where heads differ a state holds one list of places, [N, S, ...] with S their sum, those of head 0 first: a head with
none costs nothing. Chunked forms work on it *padded*, [N, P, Hk, ...] with P the most of a head, as it lies where all
heads have as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_ops.common import checks

Places = int | tuple[int, ...]  # of every key head, or of each where they are not the same


def checked_places(kept_keys: Any, heads: int, least: int) -> Places:
    """kept_keys as ``Places``. Raises ValueError for no integers >= 0, a wrong number of them, and fewer than ``least``
    in the largest."""
    if not isinstance(kept_keys, (list, tuple)):
        checks.check_count("kept_keys", kept_keys, least)
        return kept_keys
    counts = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in kept_keys)
    fits = counts and len(kept_keys) == heads and max(kept_keys) >= least
    some = f", one of them >= {least}" if least else ""
    checks.want(fits, "kept_keys", kept_keys, f"an integer >= {least}, or {heads} >= 0{some}: one a key head")
    return kept_keys[0] if len(set(kept_keys)) == 1 else tuple(kept_keys)


def most(places: Places | None) -> int:
    """The places of the head that has most, 0 for None."""
    return max(places) if isinstance(places, tuple) else places or 0


def each(places: Places, heads: int) -> Sequence[int]:
    """The places of every head."""
    return places if isinstance(places, tuple) else [places] * heads


def padded(x: Tensor, places: Places, fill: float = 0) -> Tensor:
    """[N, P, Hk, ...] of [N, S, ...], ``fill`` in what is no place; x itself where all heads have as many."""
    if not isinstance(places, tuple):
        return x
    wide, rest = max(places), (0, 0) * (x.ndim - 2)
    return torch.stack([F.pad(part, (*rest, 0, wide - part.shape[1]), value=fill) for part in x.split(places, 1)], 2)


def listed(x: Tensor, places: Places) -> Tensor:
    """[N, S, ...] of [N, P, Hk, ...], the first places of each head; x itself where all heads have as many."""
    if not isinstance(places, tuple):
        return x
    return torch.cat([x[:, :count, h] for h, count in enumerate(places)], 1)


def to_listed(x: Tensor, places: tuple[int, ...]) -> Tensor:
    """[N, S, ...] of [N, Hk, ...]: that of its head in every place."""
    parts = [x[:, h : h + 1].expand(-1, count, *x.shape[2:]) for h, count in enumerate(places)]
    return torch.cat(parts, 1)


def beyond(places: tuple[int, ...], device: torch.device) -> Tensor:
    """[P, Hk] bool: which of the padded places are none."""
    place = torch.arange(max(places), device=device)
    return torch.stack([place >= count for count in places], 1)
