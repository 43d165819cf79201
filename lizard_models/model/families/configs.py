"""The configurations of the Lizard families: light to import, and registered with transformers' AutoConfig.

A configuration that is made loads its family's classes, so that whoever has one finds them in the other Auto classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar

from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)


class FamilyConfig:
    """Mixed into a family's configuration."""

    family_file: ClassVar[str]
    """The file of the family's classes beside this one."""

    auto_map: ClassVar[dict[str, str]] = {}
    """Code of a checkpoint's own, which there is none of: TRL's trainers read it of every config."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        import_module(f"{__package__}.{cls.family_file}")
        return super().__new__(cls)


class LizardLlamaConfig(FamilyConfig, LlamaConfig):
    """A Llama config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_llama"
    family_file = "llama"
    lizard: dict | None = None


class LizardMistralConfig(FamilyConfig, MistralConfig):
    """A Mistral config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_mistral"
    family_file = "mistral"
    lizard: dict | None = None


class LizardQwen2Config(FamilyConfig, Qwen2Config):
    """A Qwen2 config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_qwen2"
    family_file = "qwen2"
    lizard: dict | None = None


class LizardQwen3Config(FamilyConfig, Qwen3Config):
    """A Qwen3 config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_qwen3"
    family_file = "qwen3"
    lizard: dict | None = None


class LizardSmolLM3Config(FamilyConfig, SmolLM3Config):
    """A SmolLM3 config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_smollm3"
    family_file = "smollm3"
    lizard: dict | None = None


class LizardGemma2Config(FamilyConfig, Gemma2Config):
    """A Gemma 2 config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_gemma2"
    family_file = "gemma2"
    lizard: dict | None = None


class LizardGemma3TextConfig(FamilyConfig, Gemma3TextConfig):
    """A Gemma 3 text config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_gemma3_text"
    family_file = "gemma3"
    lizard: dict | None = None


CONFIGS: tuple[Any, ...] = (
    LizardLlamaConfig,
    LizardMistralConfig,
    LizardQwen2Config,
    LizardQwen3Config,
    LizardSmolLM3Config,
    LizardGemma2Config,
    LizardGemma3TextConfig,
)
for config in CONFIGS:
    # the families' plans know nothing of the new parameters; that of tensor parallelism comes with the models
    config.base_model_tp_plan = config.base_model_pp_plan = None
    AutoConfig.register(config.model_type, config)
