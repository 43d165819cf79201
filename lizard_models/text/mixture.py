"""Training text of several sources, each with a weight: its share of the sequences of an epoch."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lizard_models.text.sequences import PackedTokens, StreamedTokens, TooLittleText, load_sequences


class MixedTokens(PackedTokens):
    """An epoch of as many sequences as ``parts`` have together, of which part i gives the share w_i / sum w.

    weights: w, one positive number for each part. Shares are rounded so that they add up, the largest remainders up.
    Of a part with more sequences than its share some are left out, of one with fewer each comes again as often as any
    other of it, or once more. ``seed`` chooses them and their order. ``counts`` has the number of each part,
    ``sequences`` every one that is used, once; ``digest`` is the sha256 of the parts' digests, what is used, and seed.

    Raises ValueError for a weight too small for one sequence.
    """

    def __init__(self, parts: Sequence[PackedTokens], weights: Sequence[float], seed: int = 0) -> None:
        self.counts = shares(weights, sum(map(len, parts)))
        for weight, count in zip(weights, self.counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"weights: got {list(weights)}, of which {weight:g} gives none of {sum(self.counts)} sequences; "
                    "give a larger weight, or leave that source out"
                )
        draw, chosen, start = np.random.default_rng(seed), [], 0
        for part, count in zip(parts, self.counts, strict=True):
            passes = [draw.permutation(len(part)) for _ in range(math.ceil(count / len(part)))]
            chosen.append(start + np.concatenate(passes)[:count])
            start += len(part)
        used, places = np.unique(np.concatenate(chosen), return_inverse=True)
        ends = np.cumsum([len(part) for part in parts])
        of = np.searchsorted(ends, used, side="right")
        self.sequences = np.stack(
            [parts[p].stored(int(i - ends[p] + len(parts[p]))) for p, i in zip(of, used, strict=True)]
        )
        self.order = draw.permutation(places)
        told = [*(part.digest for part in parts), *map(str, self.counts), f"seed {seed}"]
        self.digest = hashlib.sha256("\n".join(told).encode()).hexdigest()

    def once(self) -> MixedTokens:
        """The same without what comes again."""
        other = copy.copy(self)
        _, first = np.unique(self.order, return_index=True)
        other.order = self.order[np.sort(first)]
        return other


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportion of ``weights`` that add up to ``total``, by the largest remainders."""
    exact = [total * weight / math.fsum(weights) for weight in weights]
    whole = [math.floor(share) for share in exact]
    left = sorted(range(len(whole)), key=lambda i: whole[i] - exact[i])[: total - sum(whole)]
    return [count + (i in left) for i, count in enumerate(whole)]


def load_mixture(
    sources: Sequence[str],
    weights: Sequence[float],
    tokenizer: PreTrainedTokenizerBase | None,
    seq_len: int,
    **settings: Any,
) -> PackedTokens | StreamedTokens:
    """``load_sequences`` of all sources, or with ``weights``, one for each, a ``MixedTokens`` of them.

    settings: further arguments of ``load_sequences``; ``examples`` then counts in every source. Raises ValueError as
    that and as ``MixedTokens``, and for a source that is streamed, whose number of sequences nobody knows.
    """
    if not weights:
        return load_sequences(sources, tokenizer, seq_len, **settings)
    parts = []
    for source in sources:
        try:
            part = load_sequences([source], tokenizer, seq_len, **settings)
        except TooLittleText as error:
            error.args = (f"{error} (of {source!r}, which has a weight of its own)",)
            raise
        if isinstance(part, StreamedTokens):
            raise ValueError(
                f"weights: {source!r} is streamed, so the number of its sequences is not known; give the stages a "
                "number of `examples`, or leave `weights` out"
            )
        parts.append(part)
    return MixedTokens(parts, weights, settings.get("seed", 0))
