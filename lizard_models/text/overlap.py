"""How much of an evaluation text was trained on: runs of tokens that stand in both."""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lizard_models.text.sequences import PackedTokens

RUN = 32  # tokens in a row that two texts share by chance only if they quote the same
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2**64
BLOCK = 1 << 20  # positions of the training text that are hashed at a time


class Overlap(NamedTuple):
    """Share of the runs of ``RUN`` tokens that stand in the training text too: of each document, and of all."""

    by_document: list[float]
    share: float

    def told(self) -> str:
        """For people; empty if there is none."""
        found = [f"document {number} {share:.0%}" for number, share in enumerate(self.by_document, 1) if share]
        if not found:
            return ""
        shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        return (
            f"{self.share:.1%} of the evaluation text stands in the training text too, {RUN} tokens in a row and more "
            f"({shown}): its losses show what was seen"
        )


def overlap(documents: Tensor, training: PackedTokens) -> Overlap | None:
    """documents [N, T] int64. None for documents shorter than a run.

    Runs are compared by a 64-bit hash, sum_j t[i + j] BASE**j modulo 2**64, of every place of both texts. A run of the
    training text may cross from one of its documents into the next.
    """
    rows = documents.numpy()
    if rows.shape[1] < RUN:
        return None
    wanted = np.stack([_hashes(row) for row in rows])  # [N, T - RUN + 1]
    known = np.unique(wanted)
    seen = np.zeros(len(known), dtype=bool)
    for start in count(0, BLOCK):
        tokens = training.tokens(start, start + BLOCK + RUN - 1)
        if len(tokens) < RUN:
            break
        found = _hashes(tokens)
        at = np.searchsorted(known, found).clip(max=len(known) - 1)
        seen[at[known[at] == found]] = True
    there = seen[np.searchsorted(known, wanted)]
    return Overlap([float(share) for share in there.mean(1)], float(there.mean()))


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """The hash of every run of ``tokens`` [T], [T - RUN + 1] uint64."""
    ids = tokens.astype(np.uint64) + np.uint64(1)
    count = max(0, len(ids) - RUN + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    power = np.uint64(1)
    with np.errstate(over="ignore"):
        for j in range(RUN):
            hashes += ids[j : j + count] * power
            power = np.multiply(power, BASE)
    return hashes
