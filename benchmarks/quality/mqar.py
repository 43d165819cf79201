"""Multi-query associative recall from scratch (arXiv 2312.04927): what each kind of memory can hold.

A row of text is N pairs of a key and its value, then filler in which every key stands once more, at a place of its own;
there the model must say its value. Small models that differ in the mixer alone are trained on it, with memories of the
same number of bytes a layer (attention's grows and has no bound).

Shapes: B batch, T length, V vocabulary, d width, H heads, D head dim.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.mqar_scores import KeptKeys, ScoreLessons, values_kept
from benchmarks.quality.records import merge_records, read_record
from lizard_layers import (
    AttentionChoices,
    AttentionConfig,
    FeatureMaps,
    HybridAttention,
    build_gate,
    empty_state,
    state_bytes,
)
from lizard_models.config import LizardConfig
from lizard_models.distill.losses import IGNORED
from lizard_models.files.environment import environment
from lizard_models.files.sources import Say, silent
from lizard_ops import apply_rotary, chunk_gated_attn

KEPT = {"kept": ("left", True), "kept-outside": ("outside", True), "kept-fixed": ("left", False)}
"""Hybrids with kept keys: their coverage, and whether their scores learn or stay as they start."""

MIXERS = ("attention", "lizard", "gla", "window", *KEPT)
ROPE_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The task and the size of the models."""

    length: int = 512
    pairs: tuple[int, ...] = (16, 32, 64, 128)
    """Numbers of pairs N, each trained on equally often and measured apart; 3 N must fit into the length."""
    vocabulary: int = 8192
    width: int = 128
    heads: int = 2
    layers: int = 2
    window: int = 32
    """Of the hybrid. The other memories get its number of bytes."""
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    precision: str = "fp32"
    """fp32, or bf16: products under autocast, weights and the output layer in float32."""
    kept: KeptKeys = field(default_factory=KeptKeys)
    """Of the mixers with kept keys."""

    def __post_init__(self) -> None:
        if 3 * max(self.pairs) > self.length:
            raise ValueError(f"pairs: {max(self.pairs)} pairs and their questions do not fit into {self.length} tokens")
        if 2 * max(self.pairs) >= self.vocabulary:
            raise ValueError(f"vocabulary: {self.vocabulary} has too few keys for {max(self.pairs)} pairs")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width={self.width} must divide into heads={self.heads} of an even head dim")


def recall_batch(recall: Recall, pairs: int, rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and targets [B, T], ``IGNORED`` wherever no value is asked for.

    Token 0 is filler, the lower half of the vocabulary is keys, the upper half values. They are drawn, and are, on the
    device of ``draw``.
    """
    half = recall.vocabulary // 2
    where: dict[str, Any] = {"generator": draw, "device": draw.device}
    keys = 1 + torch.rand(rows, half - 1, **where).argsort(1)[:, :pairs]
    values = torch.randint(half, recall.vocabulary, (rows, pairs), **where)
    tokens = torch.zeros(rows, recall.length, dtype=torch.int64, device=draw.device)
    targets = torch.full_like(tokens, IGNORED)
    tokens[:, : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    places = 2 * pairs + torch.rand(rows, recall.length - 2 * pairs, **where).argsort(1)[:, :pairs]
    tokens.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return tokens, targets


class SoftmaxMixer(nn.Module):
    """Causal softmax attention, or its last ``window`` keys."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k = apply_rotary(q, *rope), apply_rotary(k, *rope)
        mask = None
        if self.window is not None:
            distance = torch.arange(q.shape[1], device=q.device).unsqueeze(1) - torch.arange(
                q.shape[1], device=q.device
            )
            mask = (distance >= 0) & (distance < self.window)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


class LinearMixer(nn.Module):
    """Gated linear attention alone, with the hybrid's feature maps and gate over every key."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.maps, self.gate = FeatureMaps(config), build_gate(config)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        mapped = self.maps(q, k)[-2:]
        fq, fk = (torch.cat([f.softmax(-1), (-f).softmax(-1)], -1).to(q.dtype) for f in mapped)
        with torch.autocast(x.device.type, enabled=False):  # the gate stays float32
            g = None if self.gate is None else self.gate(x, k)
        return chunk_gated_attn(fq, fk, v, g)[0]


class HybridMixer(nn.Module):
    """A layer of ``plain``."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.lizard = HybridAttention(config)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return self.lizard(x, q, k, v, rope)[0]


def mixer_config(recall: Recall, **changes: Any) -> AttentionConfig:
    """The layer of ``plain`` in the shape of the small models, with as many columns as channels.

    So the linear branch alone, which gets the bytes of the window too, keeps within the 256 features of the kernels.
    """
    base = LizardConfig.preset("plain").attention
    choices: AttentionChoices = dataclasses.replace(
        base, **{"window": recall.window, "positions": "true", "feature_dim": None, **changes}
    )
    head_dim = recall.width // recall.heads
    return AttentionConfig.from_choices(
        choices, hidden_size=recall.width, num_heads=recall.heads, num_key_heads=recall.heads, head_dim=head_dim
    )


def kept_config(kind: str, recall: Recall, allowed: int) -> AttentionConfig:
    """A layer with kept keys: fewer keys in the window, fewer features, and as many places as ``allowed`` bytes hold.

    Scores do not read what keys receive in the window: nothing in it asks for them in this task.

    Raises ValueError where no place fits.
    """
    kept, head_dim = recall.kept, recall.width // recall.heads

    def having(places: int) -> AttentionConfig:
        return mixer_config(
            recall,
            window=max(3, recall.window // 4) if kept.window is None else kept.window,
            feature_dim=head_dim // 2 if kept.columns is None else kept.columns,
            coverage=KEPT[kind][0],
            kept_keys=places,
            score_dim=kept.score_dim,
            score_received=False,
        )

    one, two = (state_bytes(empty_state(having(places), 1, device="meta")) for places in (1, 2))
    if one > allowed:
        raise ValueError(f"{kind}: one kept key takes {one:,} bytes a layer, wanted at most the hybrid's {allowed:,}")
    return having(1 + (allowed - one) // (two - one))


def build_mixer(kind: str, recall: Recall) -> tuple[nn.Module, int]:
    """A mixer, and the bytes of memory a layer of it keeps for one sequence of the task's length, in float32.

    Raises ValueError for an unknown kind.
    """
    hybrid = mixer_config(recall)
    allowed = state_bytes(empty_state(hybrid, 1, device="meta"))
    row = 4 * 2 * recall.width  # bytes of one key and one value in every head
    if kind == "attention":
        return SoftmaxMixer(), row * recall.length
    if kind == "lizard":
        return HybridMixer(hybrid), allowed
    if kind in KEPT:
        config = kept_config(kind, recall, allowed)
        return HybridMixer(config), state_bytes(empty_state(config, 1, device="meta"))
    if kind == "window":
        return SoftmaxMixer(allowed // row), allowed // row * row
    if kind == "gla":
        feature = 4 * recall.heads * (hybrid.head_dim + 1)  # bytes of one row of the sums in every head
        config = mixer_config(recall, feature_dim=allowed // feature // 2)
        return LinearMixer(config), config.num_features * feature
    raise ValueError(f"mixer {kind!r}: wanted one of {', '.join(MIXERS)}")


def memory_line(kind: str, recall: Recall) -> str:
    """What a layer of a mixer remembers, in words."""
    mixer, size = build_mixer(kind, recall)
    if isinstance(mixer, HybridMixer):
        config = mixer.lizard.config
        places = f", {config.kept_keys} kept keys a head" if config.keeps_keys else ""
        return f"{kind}: {size:,} bytes a layer; window {config.window}, {config.num_features} features{places}"
    if isinstance(mixer, SoftmaxMixer):
        return f"{kind}: {size:,} bytes a layer; window {mixer.window or recall.length}"
    return f"{kind}: {size:,} bytes a layer"


class Block(nn.Module):
    """A short convolution, a mixer and an MLP, each added to the stream. Every mixer gets the convolution alike."""

    def __init__(self, recall: Recall, mixer: nn.Module) -> None:
        super().__init__()
        d = recall.width
        self.heads = recall.heads
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(2))
        self.convolution = nn.Conv1d(d, d, 4, groups=d, padding=3)
        self.projections = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(4))
        self.mixer = mixer
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.norms[0](x)
        mixed = normed + self.convolution(normed.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        q, k, v = (p(mixed).unflatten(-1, (self.heads, -1)) for p in self.projections[:3])
        x = x + self.projections[3](self.mixer(mixed, q, k, v, rope).flatten(2))
        return x + self.mlp(self.norms[1](x))


class RecallModel(nn.Module):
    """tokens [B, T] -> logits [B, T, V], or [N, V] of the N positions in the mask ``where`` [B, T]."""

    def __init__(self, recall: Recall, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(recall.vocabulary, recall.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(recall, build_mixer(kind, recall)[0]) for _ in range(recall.layers))
        self.norm = nn.RMSNorm(recall.width)
        self.head_dim = recall.width // recall.heads
        self.bf16 = recall.precision == "bf16"

    def forward(self, tokens: Tensor, where: Tensor | None = None) -> Tensor:
        angles = torch.arange(self.head_dim // 2, device=tokens.device) * (-2 * math.log(ROPE_BASE) / self.head_dim)
        turns = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(1) * angles.exp()
        turns = torch.cat([turns, turns], -1).unsqueeze(0)
        x, rope = self.embedding(tokens), (turns.cos(), turns.sin())
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks:
                x = block(x, rope)
        return F.linear(self.norm(x if where is None else x[where]), self.embedding.weight)


@torch.no_grad()
def recall_accuracy(model: nn.Module, recall: Recall, pairs: int, batches: int = 8) -> float:
    """Share of the questions answered right, on rows that training has not seen."""
    draw = torch.Generator(next(model.parameters()).device).manual_seed(1_000_003 + pairs)
    right = asked = 0
    for _ in range(batches):
        tokens, targets = recall_batch(recall, pairs, recall.batch_size, draw)
        counted = targets != IGNORED
        right += int((model(tokens, counted).argmax(-1) == targets[counted]).sum())
        asked += int(counted.sum())
    return right / asked


def train_recall(kind: str, recall: Recall, device: str) -> dict[str, Any]:
    """Trains one model and measures it: accuracy by number of pairs, bytes of memory a layer, parameters, losses.

    AdamW (0.9, 0.95), decay 0.1, a tenth of the steps of warm-up, cosine to zero, clip 1.0, float32 weights. Of a mixer
    with kept keys also the losses of its scores, and the share of the values that are kept at a row's end.
    """
    torch.manual_seed(recall.seed)
    model = RecallModel(recall, kind).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]  # scores of keys have lessons of their own
    lessons = ScoreLessons(model, recall.kept) if kind in KEPT and KEPT[kind][1] else None
    optimizer = torch.optim.AdamW(trained, lr=recall.learning_rate, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=device != "cpu")  # fmt: skip
    warmup = max(1, recall.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / recall.steps))),
    )
    draw = torch.Generator(device).manual_seed(recall.seed)
    started, losses, lesson, score_losses = time.monotonic(), [], math.nan, []
    for step in range(recall.steps):
        pairs = recall.pairs[step % len(recall.pairs)]
        tokens, targets = recall_batch(recall, pairs, recall.batch_size, draw)
        counted = targets != IGNORED
        loss = F.cross_entropy(model(tokens, counted), targets[counted])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if lessons is not None and step % recall.kept.every == 0:
            lesson = lessons.give(tokens, float(schedule.get_last_lr()[0]) / recall.learning_rate)
        schedule.step()
        if (step + 1) % max(1, recall.steps // 40) == 0:
            losses.append((step + 1, loss.item()))
            score_losses.append((step + 1, lesson))
    model.eval()
    return {
        **(_of_scores(model, recall, score_losses if lessons else []) if kind in KEPT else {}),
        "accuracy": {str(pairs): recall_accuracy(model, recall, pairs) for pairs in recall.pairs},
        "memory_bytes": build_mixer(kind, recall)[1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
        "seconds": time.monotonic() - started,
    }


def _of_scores(model: RecallModel, recall: Recall, losses: list[tuple[int, float]]) -> dict[str, Any]:
    kept = {}
    for pairs in recall.pairs:
        draw = torch.Generator(next(model.parameters()).device).manual_seed(1_000_003 + pairs)
        kept[str(pairs)] = values_kept(model, recall_batch(recall, pairs, recall.batch_size, draw)[0], pairs)
    return {"values_kept": kept, "score_losses": losses}


def run_recall(
    out: Path,
    rows: Sequence[tuple[str, Recall]],
    rates: Sequence[float],
    *,
    device: str,
    jobs: int = 1,
    minutes: float | None = None,
    say: Say = silent,
) -> None:
    """Trains every (mixer, task) at every rate, ``jobs`` at a time. The best rate's result is a line of ``out``.

    Finished rows are left out. minutes: trainings not started by then are not started any more.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    waiting: dict[str, dict[str, Any]] = {}
    for kind, recall in rows:
        stem = f"{kind}.s{recall.seed}"
        settings = json.loads(json.dumps({**dataclasses.asdict(recall), "mixer": kind, "learning_rate": list(rates)}))
        if kind not in KEPT:
            del settings["kept"]
        finished = read_record(out, stem)
        if finished is None or finished["settings"] != settings:
            waiting[stem] = {"kind": kind, "recall": recall, "settings": settings, "results": {}}
    calls = [
        (stem, rate, (row["kind"], dataclasses.replace(row["recall"], learning_rate=rate), device, deadline))
        for stem, row in waiting.items()
        for rate in rates
    ]
    for stem, rate, result in _carried_out(calls, jobs):
        results = waiting[stem]["results"]
        if result is None:
            say(f"{stem} at rate {rate:g}: not started, the time is up")
            continue
        results[rate] = result
        if len(results) == len(rates):
            best = max(results, key=lambda rate: sum(results[rate]["accuracy"].values()))
            by_rate = {str(rate): result["accuracy"] for rate, result in results.items()}
            record = {"settings": waiting[stem]["settings"], "best_rate": best, "by_rate": by_rate, **results[best]}
            merge_records(out, {stem: record | {"environment": environment()}})
            shown = ", ".join(f"{n} pairs {share:.1%}" for n, share in results[best]["accuracy"].items())
            say(f"{stem}: {shown} at rate {best:g}, {results[best]['seconds']:.0f} s")


def _carried_out(
    calls: Sequence[tuple[str, float, tuple[Any, ...]]], jobs: int
) -> Iterator[tuple[str, float, dict[str, Any] | None]]:
    """The calls' results as they end: in this process, or in ``jobs`` others."""
    if jobs == 1:
        yield from ((stem, rate, _timely(*arguments)) for stem, rate, arguments in calls)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_timely, *arguments): (stem, rate) for stem, rate, arguments in calls}
        for future in as_completed(futures):
            yield *futures[future], future.result()


def _timely(kind: str, recall: Recall, device: str, deadline: float | None) -> dict[str, Any] | None:
    """``train_recall`` unless the time is up. The clock of ``time.monotonic`` is the same in every process."""
    if deadline is not None and time.monotonic() > deadline:
        return None
    return train_recall(kind, recall, device)
