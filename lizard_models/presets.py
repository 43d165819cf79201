"""Named configurations as plain data: what each changes in the defaults of ``LizardConfig``.

One framework, so that every comparison is one run. Read with ``LizardConfig.preset(name)``.
"""

from __future__ import annotations

from typing import Any

Preset = dict[str, dict[str, Any]]


def _changed(base: Preset, **changes: dict[str, Any]) -> Preset:
    return {part: {**base.get(part, {}), **changes.get(part, {})} for part in {**base, **changes}}


PAPER: Preset = {
    "attention": {
        "window": 128,
        "window_rope": False,
        "num_sinks": 4,
        "coverage": "all",
        "feature_projection": "per_head",
        "key_map": "query_head",
        "feature_dim": 128,
        "feature_dim_counts": "features",
        "gate": "scalar",
        "gate_init": 0.99,
        "mix": "sum",
        "alpha": "learned",
    },
}
"""The paper's method and recipe (Table 13) with the sound reading where the printed one is not: exponential sinks and
a gate that remembers at the start. No RoPE in the layer, as its equations have none."""

PAPER_LITERAL = _changed(
    PAPER,
    attention={
        "sink_form": "linear",
        "sink_init": 1.0,
        "sink_spread": 0.1,
        "feature_projection": "shared",
        "key_map": "key_head",
        "gate_init": None,
        "alpha": "fixed",
    },
    stage2={"train_new_parameters": False},
)
"""The equations as printed: sink mass sum t_j, one pair of feature maps for all heads, an unbiased gate, alpha = 1,
adapters alone in stage 2. The denominators can vanish in training."""

PLAIN: Preset = {
    "attention": {
        "window": 128,
        "anchors": 4,
        "positions": "clamped",
        "window_rope": True,
        "coverage": "outside",
        "feature_dim": 128,
        "gate": "key_head",
        "gate_init": 0.985,
        "mix": "merge",
        "merge_bias": "head_and_token",
    },
    "stage1": {
        "error": "relative",
        "target": "output",
        "learning_rate": 1e-2,
        "gate_learning_rate": 1e-3,
        "sequence_length": 1024,
        "batch_size": 4,
        "epochs": None,
        "max_steps": 400,
        "examples": None,
    },
    "stage2": {
        "learning_rate": 1e-3,
        "new_learning_rate": 5e-3,
        "gate_learning_rate": 1e-3,
        "lora_rank": 32,
        "lora_alpha": 64,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "cross_entropy_weight": 0.0,
        "kl_weight": 1.0,
        "sequence_length": 1024,
        "batch_size": 4,
        "epochs": None,
        "max_steps": 150,
        "examples": None,
    },
}
"""Nothing kept but what is near: equal to the teacher up to the window before any training, the first four tokens
kept, the linear branch on the rest with maps of 128 columns, stage 1 compared after the output projection, adapters on
every projection in stage 2 and maps that go on learning there."""

RECOMMENDED = _changed(
    PLAIN,
    attention={
        "kept_keys": 608,
        "kept_past": "dropped",
        "feature_dim": 64,
        "coverage": "left",
        "score_received": True,
    },
    stage0={"share_places": True, "sequence_length": 8192, "batch_size": 1},  # which show uses far away
    stage1={"sequence_length": 4096, "batch_size": 1},  # shorter ones hardly leave window and places
    stage2={"sequence_length": 4096, "batch_size": 1},
)
"""What our own ablations show best: ``plain`` with keys that stay exact because a learned score says so, and sequences
long enough to leave them."""

WINDOW_ONLY = _changed(PLAIN, attention={"linear_branch": False})
"""The control beside every result: window and anchors of ``plain`` without a linear branch."""

LOLCATS: Preset = {
    "attention": {
        "window": 64,
        "window_rope": True,
        "linear_rope": True,
        "coverage": "outside",
        "feature_projection": "per_head",
        "key_map": "query_head",
        "feature_dim": 64,
        "gate": "none",
        "mix": "merge",
        "merge_bias": "head",
        "merge_bias_init": 2.302585092994046,  # log 10
    },
    "stage1": {"learning_rate": 1e-2, "sequence_length": 1024},
    "stage2": {
        "learning_rate": 1e-4,
        "sequence_length": 1024,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
}
"""LoLCATs (arXiv 2410.10254): out-of-window keys without a gate, one denominator, window factor 0.1."""

LIGER: Preset = {
    "attention": {
        "window": 64,
        "window_rope": True,
        "coverage": "all",
        "normalize": False,
        "feature_activation": "one_sided_softmax",
        "feature_projection": "none",
        "feature_scale": 0.5,
        "gate": "pooling",
        "gate_init": None,
        "gate_temperature": 16.0,
        "mix": "sum",
        "alpha_init": 0.5,
    },
    "stage2": {"learning_rate": 1e-4},
}
"""Liger (arXiv 2503.01496): no new parameters, so stage 2 alone. Softmax features, a gate pooled from the keys, and
half of each branch."""

PRESETS: dict[str, Preset] = {
    "paper": PAPER,
    "paper_literal": PAPER_LITERAL,
    "plain": PLAIN,
    "recommended": RECOMMENDED,
    "lolcats": LOLCATS,
    "liger": LIGER,
    "window_only": WINDOW_ONLY,
}
