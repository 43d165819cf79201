"""Likelihood requests of lm-eval's tasks apart from lm-eval: recorded once, scored anywhere, answered later.

lm-eval asks a model for the log-likelihood of continuations. ``RecordedLM`` notes what it asks; ``score`` answers with
torch and transformers alone, on a machine that has neither lm-eval nor the data; ``RecordedLM`` gives lm-eval the
answers.
"""

from __future__ import annotations

import hashlib
import io
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_models.evaluation.position_loss import float32_head
from lizard_models.files.sources import Say, silent

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of its continuation


@dataclass
class Requests:
    """Distinct (context, continuation) pairs as token ids; continuations that share a context are stored with it once.

    contexts, continuations: ids laid end to end, pair i being contexts[context_ends[c - 1]:context_ends[c]] with
    c = context_of[i] and the i-th part of continuations.
    """

    contexts: np.ndarray
    context_ends: np.ndarray
    continuations: np.ndarray
    continuation_ends: np.ndarray
    context_of: np.ndarray

    FIELDS = ("contexts", "context_ends", "continuations", "continuation_ends", "context_of")

    @classmethod
    def from_pairs(cls, pairs: Sequence[Pair]) -> Requests:
        """The distinct ones of ``pairs``. Raises ValueError for an empty context or continuation."""
        if any(not len(context) or not len(continuation) for context, continuation in pairs):
            raise ValueError("pairs: every context and every continuation must have at least one token")
        largest = max((max(part) for pair in pairs for part in pair), default=0)
        dtype = np.uint16 if largest < 1 << 16 else np.int32
        distinct = sorted({(tuple(context), tuple(continuation)) for context, continuation in pairs})
        contexts: dict[tuple[int, ...], int] = {}
        context_of = [contexts.setdefault(context, len(contexts)) for context, _ in distinct]
        return cls(
            *_joined(list(contexts), dtype),
            *_joined([continuation for _, continuation in distinct], dtype),
            np.array(context_of, np.int32),
        )

    def __len__(self) -> int:
        return len(self.context_of)

    def context(self, index: int) -> np.ndarray:
        """Ids of a context by its number."""
        return _part(self.contexts, self.context_ends, index)

    def continuation(self, index: int) -> np.ndarray:
        """Ids of the continuation of pair ``index``."""
        return _part(self.continuations, self.continuation_ends, index)

    @property
    def digest(self) -> str:
        """sha256 of all ids."""
        digest = hashlib.sha256()
        for name in self.FIELDS:
            digest.update(np.ascontiguousarray(getattr(self, name), dtype="<i4").tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes one xz file."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(self, name) for name in self.FIELDS})
        path.write_bytes(lzma.compress(buffer.getvalue(), preset=6))

    @classmethod
    def load(cls, path: Path) -> Requests:
        """The inverse of ``save``. Raises ValueError for a file that is not one of requests."""
        try:
            with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as file:
                return cls(*(file[name] for name in cls.FIELDS))
        except (lzma.LZMAError, KeyError, ValueError) as error:
            raise ValueError(f"requests: {str(path)!r} is not a file that `requests` wrote: {error}") from error


@dataclass
class Scores:
    """Answers to ``Requests`` in their order: sums of log-probabilities in nats, and whether greedy decoding agrees."""

    log_likelihoods: np.ndarray  # float64 [N]
    greedy: np.ndarray  # bool [N]
    digest: str  # of the requests

    def save(self, path: Path) -> None:
        """Writes one npz file."""
        np.savez_compressed(path, log_likelihoods=self.log_likelihoods, greedy=self.greedy, digest=self.digest)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """The inverse of ``save``."""
        with np.load(path) as file:
            return cls(file["log_likelihoods"], file["greedy"], str(file["digest"]))


@torch.no_grad()
def score(
    model: Any, requests: Requests, *, batch_tokens: int = 1 << 16, batch_rows: int = 512, say: Say = silent
) -> Scores:
    """Log-likelihood of every continuation under a causal language model, as lm-eval's HFLM computes it.

    A context with several continuations is read once: contexts of about equal length go through together, padded on the
    left, and their cache is repeated for the continuations. Logits are float32 whatever the model's dtype. Pairs longer
    than the model's positions lose tokens at their start, as in lm-eval. batch_tokens: tokens of a forward pass.
    batch_rows: continuations whose contexts are read together at most; each holds a cache, which of a Lizard model is
    as large for ten tokens as for a million.
    """
    return _Scorer(model, requests, batch_tokens, batch_rows, say).scores()


class _Scorer:
    def __init__(self, model: Any, requests: Requests, batch_tokens: int, batch_rows: int, say: Say) -> None:
        self.model, self.requests, self.say = model, requests, say
        self.batch_tokens, self.batch_rows = batch_tokens, batch_rows
        self.device = next(model.parameters()).device
        self.head = float32_head(model)
        self.longest = int(model.config.max_position_embeddings)
        self.sums = np.zeros(len(requests))
        self.greedy = np.zeros(len(requests), bool)

    def scores(self) -> Scores:
        members: dict[int, list[int]] = {}
        for pair, context in enumerate(self.requests.context_of.tolist()):
            members.setdefault(context, []).append(pair)
        shared: list[int] = []
        alone: list[int] = []
        for context, pairs in members.items():
            length = len(self.requests.context(context))
            fits = length + max(len(self.requests.continuation(pair)) for pair in pairs) <= self.longest + 1
            if len(pairs) > 1 and fits:
                shared.append(context)
            else:
                alone += pairs
        self._score_alone(alone)
        self.say(f"requests: {len(alone)} of {len(self.requests)} scored")
        shared.sort(key=lambda context: len(self.requests.context(context)))
        lengths = [len(self.requests.context(context)) for context in shared]
        for batch in self._batches(shared, lengths, [len(members[context]) for context in shared]):
            self._score_shared(batch, [members[context] for context in batch])
        return Scores(self.sums, self.greedy, self.requests.digest)

    def _score_alone(self, pairs: list[int]) -> None:
        rows = []
        for pair in pairs:
            ids = np.concatenate([self.requests.context(self.requests.context_of[pair]), self._continuation(pair)])
            rows.append((pair, ids[-(self.longest + 1) :]))
        rows.sort(key=lambda row: len(row[1]))
        for batch in self._batches(rows, [len(ids) for _, ids in rows]):
            inputs = self._padded([ids[:-1] for _, ids in batch])
            hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
            wanted = [self._continuation(pair) for pair, _ in batch]
            kept = [
                hidden[row, len(ids) - 1 - len(w) : len(ids) - 1]
                for row, ((_, ids), w) in enumerate(zip(batch, wanted, strict=True))
            ]
            self._answer([pair for pair, _ in batch], kept, wanted)

    def _batches(self, items: list[Any], lengths: list[int], caches: list[int] | None = None) -> Iterator[list[Any]]:
        """Runs of items, in order of their lengths, that take ``batch_tokens`` at most when they are padded and have
        ``batch_rows`` caches at most."""
        start = 0
        while start < len(items):
            end, rows = start + 1, caches[start] if caches else 0
            while end < len(items) and (end + 1 - start) * lengths[end] <= self.batch_tokens:
                rows += caches[end] if caches else 0
                if rows > self.batch_rows:
                    break
                end += 1
            yield items[start:end]
            start = end

    def _score_shared(self, contexts: list[int], pairs: list[list[int]]) -> None:
        ids = [self.requests.context(context) for context in contexts]
        inputs = self._padded([row[::-1] for row in ids]).flip(1)
        lengths = torch.tensor([len(row) for row in ids], device=self.device).unsqueeze(1)
        mask = torch.arange(inputs.shape[1], device=self.device) >= inputs.shape[1] - lengths
        flat = [pair for group in pairs for pair in group]
        wanted = [self._continuation(pair) for pair in flat]
        several = max(map(len, wanted)) > 1
        outputs = self.model.model(input_ids=inputs, attention_mask=mask.long(), use_cache=several)
        row_of = torch.tensor([row for row, group in enumerate(pairs) for _ in group], device=self.device)
        first = outputs.last_hidden_state[:, -1][row_of]  # [pairs, hidden]
        kept = [first[i : i + 1] for i in range(len(flat))]
        if several:
            cache = outputs.past_key_values
            cache.batch_select_indices(row_of)
            rest = self._padded([w[:-1] for w in wanted])
            seen = torch.cat([mask[row_of], torch.ones_like(rest, dtype=torch.bool)], 1).long()
            outputs = self.model.model(input_ids=rest, attention_mask=seen, past_key_values=cache, use_cache=True)
            hidden = outputs.last_hidden_state
            kept = [torch.cat([kept[i], hidden[i, : len(w) - 1]]) for i, w in enumerate(wanted)]
        self._answer(flat, kept, wanted)

    def _continuation(self, pair: int) -> np.ndarray:
        return self.requests.continuation(pair)

    def _padded(self, rows: list[np.ndarray]) -> Tensor:
        """Rows with zeros after their ends, which nothing before them can see."""
        out = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for line, row in zip(out, rows, strict=True):
            line[: len(row)] = row
        return torch.from_numpy(out).to(self.device)

    def _answer(self, pairs: list[int], hidden: list[Tensor], wanted: list[np.ndarray]) -> None:
        lengths = [len(w) for w in wanted]
        targets = torch.from_numpy(np.concatenate(wanted).astype(np.int64)).to(self.device)
        losses, agrees = [], []
        for h, target in zip(torch.cat(hidden).split(1024), targets.split(1024), strict=True):
            logits = self.head(h)
            losses.append(F.cross_entropy(logits, target, reduction="none").double())
            agrees.append(logits.argmax(-1) == target)
        totals = [part.sum() for part in torch.cat(losses).split(lengths)]
        whole = [part.all() for part in torch.cat(agrees).split(lengths)]
        self.sums[pairs] = -torch.stack(totals).cpu().numpy()
        self.greedy[pairs] = torch.stack(whole).cpu().numpy()


def _joined(parts: Sequence[Sequence[int]], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([token for part in parts for token in part], dtype)
    return ids, np.cumsum([len(part) for part in parts], dtype=np.int64)


def _part(ids: np.ndarray, ends: np.ndarray, index: int) -> np.ndarray:
    return ids[0 if index == 0 else ends[index - 1] : ends[index]]
