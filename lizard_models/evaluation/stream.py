"""Loss of a stream of any length in fixed memory, and what it costs as it goes: time, resident and CUDA memory."""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.table import Table
from torch import Tensor
from transformers.cache_utils import Cache

from lizard_models.distill.losses import position_losses
from lizard_models.evaluation.position_loss import PositionLoss, bucket_edges, float32_head
from lizard_models.evaluation.report import short
from lizard_models.files.environment import environment, without_nan
from lizard_models.model.cache import empty_cache
from lizard_models.model.cache_name import CACHE
from lizard_models.text.token_stream import token_chunks

CHUNK = 2048
SAMPLES = 512  # kept of a run, evenly spread, whatever its length


@torch.no_grad()
def stream_losses(
    model: Any, tokens: Iterable[np.ndarray], chunk: int = CHUNK, cache: Cache | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Next-token losses of one text of any length, ``chunk`` positions at a time.

    model: a causal language model in eval mode. tokens: ids in pieces of any sizes, e.g. of ``stream_tokens``; they
    are read as they are needed. cache: filled along; None makes an empty one. With a Lizard model nothing grows with
    the length; another model's cache does.

    Yields (first position, losses [n] float32 on the CPU): position t predicts token t + 1, so N tokens give N - 1
    losses. They are those of one forward over the whole text, up to rounding. Raises ValueError for chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    device = next(model.parameters()).device
    cache = empty_cache(model) if cache is None else cache
    position, head = 0, float32_head(model)
    for ids in token_chunks(tokens, chunk, overlap=1):
        row = torch.from_numpy(ids.astype(np.int64)).to(device)[None]
        hidden = model.model(input_ids=row[:, :-1], use_cache=True, **{CACHE: cache}).last_hidden_state
        losses = position_losses(hidden, head, row[:, 1:])[0].cpu()
        yield position, losses
        position += len(losses)


@dataclass
class Sample:
    """A moment of a stream."""

    tokens: int  # read so far
    seconds: float
    loss: float  # mean over the chunk that ended here, nats
    resident: int  # bytes of the process in memory
    cuda: int  # bytes of tensors on the GPU, 0 without one


class StreamMeter:
    """Takes the losses as they come and keeps a fixed amount of them: sums by bucket, and at most 512 samples.

    Buckets are 0, 128, 512, 1024, 2048, ... doubling without end.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.process = psutil.Process()
        self.trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
        self.started = time.monotonic()
        self.tokens = 0
        self.sums: list[float] = []
        self.samples: list[Sample] = []
        self.last: Sample | None = None
        self.stride, self.chunks = 1, 0

    def add(self, position: int, losses: Tensor) -> Sample:
        """Losses [n] of the positions from ``position`` on, in order."""
        end = position + len(losses)
        edges = bucket_edges(end)
        self.sums += [0.0] * (len(edges) - 1 - len(self.sums))
        exact = losses.double()
        for b, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            low, high = max(low, position), min(high, end)
            if low < high:
                self.sums[b] += float(exact[low - position : high - position].sum())
        self.tokens = end
        sample = Sample(end, time.monotonic() - self.started, float(exact.mean()), *self._memory())
        if self.chunks % self.stride == 0:
            self.samples.append(sample)
            if len(self.samples) > SAMPLES:
                self.samples, self.stride = self.samples[::2], self.stride * 2
        self.chunks += 1
        self.last = sample
        return sample

    def _memory(self) -> tuple[int, int]:
        if self.trim is not None:  # glibc keeps freed memory at will; given back, what is resident is what is held
            self.trim(0)
        cuda = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        return self.process.memory_info().rss, cuda

    def losses(self) -> PositionLoss:
        """Mean loss by bucket so far, as one document: without standard errors."""
        edges = bucket_edges(self.tokens)
        means = tuple(s / (b - a) for s, a, b in zip(self.sums, edges, edges[1:], strict=False))
        return PositionLoss(edges, means, (math.nan,) * len(means))


@dataclass
class StreamReport:
    """What a stream gave: loss by bucket, speed and memory along the way."""

    title: str
    loss: PositionLoss
    samples: list[Sample]
    state_bytes: int | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Positions that predicted a token."""
        return self.samples[-1].tokens

    @property
    def tokens_per_second(self) -> float:
        """Over the whole stream, reading and tokenising included."""
        return self.tokens / self.samples[-1].seconds

    def growth(self, of: str = "resident") -> float | None:
        """Largest memory after a tenth of the stream over that at a tenth, minus 1. None for too few samples.

        of: "resident" or "cuda".
        """
        later = [s for s in self.samples if s.tokens >= self.tokens / 10]
        if len(later) < 2 or not getattr(later[0], of):
            return None
        return max(getattr(s, of) for s in later) / getattr(later[0], of) - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "title": self.title,
            "settings": self.settings,
            "environment": environment(),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "resident_growth": self.growth(),
            "cuda_growth": self.growth("cuda"),
            "state_bytes": self.state_bytes,
            "loss": {**asdict(self.loss), "perplexities": self.loss.perplexities},
            "samples": [asdict(sample) for sample in self.samples],
        }

    def save(self, folder: Path, stem: str = "stream") -> Path:
        """Writes STEM.json and returns it; ``plot.save_stream`` draws beside it."""
        path = folder / f"{stem}.json"
        path.write_text(json.dumps(without_nan(self.to_dict()), indent=2) + "\n")
        return path

    def table(self) -> Table:
        """Loss by bucket of positions."""
        table = Table(title="loss in nats by position", title_justify="left", caption_justify="left")
        table.add_column("positions", justify="right")
        table.add_column("loss", justify="right")
        for mean, start, end in zip(self.loss.means, self.loss.edges, self.loss.edges[1:], strict=False):
            table.add_row(f"{short(start)}–{short(end)}", f"{mean:.4f}")
        table.caption = self.summary()
        return table

    def summary(self) -> str:
        """Length, speed and memory in two lines."""
        last = self.samples[-1]
        lines = [f"{self.tokens:,} positions in {last.seconds:.0f} s, {self.tokens_per_second:,.0f} tokens/s"]
        parts = []
        for name, of in (("resident", "resident"), ("CUDA", "cuda")):
            if size := getattr(last, of):
                growth = self.growth(of)
                change = "" if growth is None else f" ({growth:+.2%} at most after the first tenth)"
                parts.append(f"{name} {size / 2**20:,.1f} MiB{change}")
        if self.state_bytes is not None:
            parts.append(f"state {self.state_bytes / 2**20:,.2f} MiB")
        return "\n".join([*lines, ", ".join(parts)])


def measure_stream(
    model: Any,
    tokens: Iterable[np.ndarray],
    *,
    title: str,
    chunk: int = CHUNK,
    max_tokens: int | None = None,
    settings: dict[str, Any] | None = None,
    show: Callable[[StreamMeter, Sample], None] = lambda meter, sample: None,
) -> StreamReport:
    """Reads a text through a model and measures. max_tokens: positions read at most. show: called after every chunk.

    Raises ValueError for a text of fewer than two tokens.
    """
    device = next(model.parameters()).device
    cache, meter = empty_cache(model), StreamMeter(device)
    for position, losses in stream_losses(model, first_tokens(tokens, max_tokens), chunk, cache):
        show(meter, meter.add(position, losses))
    if meter.last is None:
        raise ValueError("stream: the text has fewer than two tokens")
    samples = meter.samples if meter.samples[-1] is meter.last else [*meter.samples, meter.last]
    held = cache.state_bytes() if hasattr(cache, "state_bytes") else None
    return StreamReport(title, meter.losses(), samples, held, settings or {})


def first_tokens(pieces: Iterable[np.ndarray], positions: int | None) -> Iterator[np.ndarray]:
    """The pieces up to ``positions`` + 1 tokens, so that as many positions have a token to predict."""
    left = math.inf if positions is None else positions + 1
    for piece in pieces:
        yield piece if len(piece) <= left else piece[: int(left)]
        left -= len(piece)
        if left <= 0:
            return
