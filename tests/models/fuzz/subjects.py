"""The models of the fuzz: every family, kind of layer and choice that changes what a cache holds."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from oracle import Oracle

from lizard_models.model.layer_configs import kept_layers, sliding_windows

SMALL = dict(feature_dim=8)
MOVING = SMALL | dict(position_limit=24, position_step=7)  # anchors move on within a few pieces
DROPPING = SMALL | dict(position_limit=16, position_step=5, score_dim=6)  # most texts go past it, some several times
MIXED = dict(use_sliding_window=True, sliding_window=12, max_window_layers=1)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(attention=MOVING),
    "untrained": dict(attention=SMALL, seed=None, window=24),
    "kept": dict(attention=MOVING, softmax_layers=(1,)),
    "keys": dict(attention=MOVING | dict(kept_keys=3, score_dim=6, score_received=True, score_stride=3)),
    "dropped": dict(attention=DROPPING | dict(kept_keys=3, coverage="left", kept_past="dropped")),
    "recommended": dict(preset="recommended", attention=DROPPING | dict(kept_keys=[4, 1], score_stride=3)),
    "keys beside all": dict(
        preset="paper",
        attention=dict(feature_dim=8, kept_keys=[4, 1], score_dim=6, gate="key_head"),
        softmax_layers=(1,),
    ),
    "wide": dict(attention=SMALL, wide_layers=(1,), wide_window=21, wide_gate_stretch=4.0),
    "true positions": dict(attention=SMALL | dict(positions="true", gate="channel")),
    "sinks": dict(preset="paper", attention=dict(feature_dim=8, num_sinks=2, sinks_per_head=True)),
    "linear sinks": dict(preset="paper_literal", attention=dict(feature_dim=8)),
    "lolcats": dict(preset="lolcats", attention=SMALL, softmax_layers=(0,)),
    "liger": dict(preset="liger"),
    "window alone": dict(preset="window_only", attention=dict(position_limit=16, position_step=1)),
    "mamba2": dict(attention=SMALL | dict(gate="mamba2", anchors=0, positions="true")),
    "sliding": dict(family="mistral", sliding_window=12, attention=SMALL, softmax_layers=(1,)),
    "mixed": dict(family="qwen2", attention=SMALL, **MIXED),
    "qwen3": dict(family="qwen3", attention=SMALL | dict(key_map="query_head"), softmax_layers=(1,)),
    "smollm3": dict(family="smollm3", attention=MOVING, no_rope_layers=[1, 0]),
    "gemma2": dict(family="gemma2", attention=SMALL, layer_types=["sliding_attention", "full_attention"]),
    "gemma3": dict(family="gemma3_text", attention=MOVING, layer_types=["sliding_attention", "full_attention"]),
}
CHUNKS = (
    ("gated_attn.chunk_torch", "HEAD_GATE_CHUNK", 8),
    ("gated_attn.chunk_torch", "CHANNEL_GATE_CHUNK", 4),
    ("gated_attn.chunk_torch_tiles", "SCAN", 2),
    ("window_attn.chunk_torch", "BLOCK", 4),
    ("key_expiry.chunk_torch", "TILE", 8),
)  # as tests/ops/conftest.py has them: short texts meet every boundary


@dataclass(frozen=True)
class Subject:
    """A student in float64 where it can be, what judges it, and what the rules ask of it."""

    name: str
    model: Any
    oracle: Oracle
    teacher: Any
    other: Any
    tolerance: float  # norms round to float32 in between, whatever the dtype of the model
    kept: bool
    sliding: bool  # some of the kept layers have a sliding window
    only_sliding: bool

    def copy(self) -> Any:
        """A model for one example, which may leave it in any state."""
        return copy.deepcopy(self.model)


@functools.cache
def subject(name: str, layers: int = 2) -> Subject:
    """The subject of that name."""
    options = dict(OPTIONS[name], num_hidden_layers=layers)
    # Gemma 2's eager softmax is float32, where a float64 mask's least number is -inf and empty rows are NaN.
    dtype = torch.float32 if name == "gemma2" else torch.float64
    model = tiny.student(**copy.deepcopy(options)).to(dtype)
    own = {k: v for k, v in options.items() if k not in (*tiny.HYBRID, "preset", "attention", "seed", "window")}
    teacher = tiny.teacher(**own).to(dtype).requires_grad_(False)
    other = tiny.student(**copy.deepcopy(options | dict(seed=5))).to(dtype)
    decoder, windows = model.model, sliding_windows(model.config)
    only_sliding = all(windows[i] is not None for i in kept_layers(model.config))
    tolerance = 1e-3 if name == "gemma2" else 1e-4
    return Subject(
        name, model, Oracle(model, teacher), teacher, other, tolerance, decoder.has_softmax_layers,
        decoder.keeps_sliding_layers, only_sliding,
    )  # fmt: skip


@contextlib.contextmanager
def small_chunks() -> Iterator[None]:
    """Chunks of a few positions in the PyTorch paths."""
    import importlib

    with pytest.MonkeyPatch.context() as patch:
        for module, name, size in CHUNKS:
            patch.setattr(importlib.import_module(f"lizard_ops.{module}"), name, size)
        yield


def text(length: int, seed: int, letters: int = 95) -> list[int]:
    """Tokens of which none is padding; few ``letters`` repeat themselves, as drafts want it."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(letters, (length,), generator=draw) + 2).tolist()
