"""The Lizard models that go through transformers' tests: every family, and what a family's model can be besides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHORT: dict[str, Any] = {"attention": {"window": 4}}  # prompts of the tests have seven tokens: they leave it
NARROW: dict[str, Any] = {"attention": {"window": 2}}  # some set sliding_window=2, which is then the teacher's own
DROPPED: dict[str, Any] = {
    "window": 4,
    "anchors": 1,
    "kept_keys": 3,
    "kept_past": "dropped",
    "coverage": "left",
    "position_limit": 6,  # so that prompts go past it, and what is written after them does twice
    "position_step": 2,
}
GEMMA: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention"],
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}


@dataclass(frozen=True)
class Variant:
    """A family, a preset, and what differs from it."""

    family: str
    preset: str = "plain"
    changes: dict[str, Any] = field(default_factory=dict)  # of the LizardConfig
    fields: dict[str, Any] = field(default_factory=dict)  # of the family's config
    pads_left: bool = False  # whether the prompts of the tests are padded on the left


VARIANTS: dict[str, Variant] = {
    "Llama": Variant("llama"),
    "Mistral": Variant("mistral", changes=NARROW, fields={"sliding_window": None}),
    "Qwen2": Variant("qwen2"),
    "Qwen3": Variant("qwen3", fields={"head_dim": 16}),
    "SmolLM3": Variant("smollm3", fields={"no_rope_layers": [1, 0]}),
    "Gemma2": Variant("gemma2", fields=GEMMA, pads_left=True),
    "Gemma3Text": Variant("gemma3_text", fields=GEMMA, pads_left=True),
    "LlamaHybrid": Variant("llama", changes={"softmax_layers": [1]}),
    "LlamaWide": Variant("llama", changes={"wide_layers": [1], "wide_window": 6, "wide_gate_stretch": 1.5}),
    "LlamaKeys": Variant("llama", changes={"attention": {"window": 4, "kept_keys": 3}}),
    "LlamaDropped": Variant("llama", changes={"attention": DROPPED}),
    "LlamaPaper": Variant("llama", preset="paper"),
    "LlamaLolcats": Variant("llama", preset="lolcats"),
    "LlamaLiger": Variant("llama", preset="liger"),
}
