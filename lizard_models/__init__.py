"""Teachers and students: conversion, distillation, evaluation. Importing this registers the Lizard families with
transformers' Auto classes."""

from __future__ import annotations

import importlib
from typing import Any

from lizard_models.config import LizardConfig
from lizard_models.model.cache import LizardCache
from lizard_models.model.families.gemma2 import LizardGemma2Config, LizardGemma2ForCausalLM, LizardGemma2Model
from lizard_models.model.families.gemma3 import LizardGemma3ForCausalLM, LizardGemma3TextConfig, LizardGemma3TextModel
from lizard_models.model.families.llama import LizardLlamaConfig, LizardLlamaForCausalLM, LizardLlamaModel
from lizard_models.model.families.mistral import LizardMistralConfig, LizardMistralForCausalLM, LizardMistralModel
from lizard_models.model.families.qwen2 import LizardQwen2Config, LizardQwen2ForCausalLM, LizardQwen2Model
from lizard_models.model.families.qwen3 import LizardQwen3Config, LizardQwen3ForCausalLM, LizardQwen3Model
from lizard_models.model.families.smollm3 import LizardSmolLM3Config, LizardSmolLM3ForCausalLM, LizardSmolLM3Model
from lizard_models.model.linearize import linearize
from lizard_models.recipes import Stage1Config, Stage2Config

_LOADED_ON_USE = {
    "load_state": "lizard_models.model.state_file",
    "save_state": "lizard_models.model.state_file",
    "linearize_folder": "lizard_models.runs.convert_folder",
    "load_teacher": "lizard_models.teachers.find",
    "neediest_layers": "lizard_models.model.widen",
    "train_stage1": "lizard_models.distill",
    "train_stage2": "lizard_models.distill",
    "widen": "lizard_models.model.widen",
}

__all__ = [
    "LizardCache",
    "LizardConfig",
    "LizardGemma2Config",
    "LizardGemma2ForCausalLM",
    "LizardGemma2Model",
    "LizardGemma3ForCausalLM",
    "LizardGemma3TextConfig",
    "LizardGemma3TextModel",
    "LizardLlamaConfig",
    "LizardLlamaForCausalLM",
    "LizardLlamaModel",
    "LizardMistralConfig",
    "LizardMistralForCausalLM",
    "LizardMistralModel",
    "LizardQwen2Config",
    "LizardQwen2ForCausalLM",
    "LizardQwen2Model",
    "LizardQwen3Config",
    "LizardQwen3ForCausalLM",
    "LizardQwen3Model",
    "LizardSmolLM3Config",
    "LizardSmolLM3ForCausalLM",
    "LizardSmolLM3Model",
    "Stage1Config",
    "Stage2Config",
    "linearize",
    *_LOADED_ON_USE,
]


def __getattr__(name: str) -> Any:
    if name in _LOADED_ON_USE:
        return getattr(importlib.import_module(_LOADED_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
