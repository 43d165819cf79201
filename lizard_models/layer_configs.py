"""What a transformers config says about the layers of a Lizard model."""

from __future__ import annotations

from transformers import PreTrainedConfig

from lizard_layers import AttentionConfig
from lizard_models.config import LizardConfig


def lizard_config(config: PreTrainedConfig) -> LizardConfig:
    """The ``LizardConfig`` inside a transformers config. Raises ValueError where there is none."""
    if getattr(config, "lizard", None) is None:
        raise ValueError(
            f"{type(config).__name__} has no Lizard choices (its field lizard is None): "
            "convert a teacher with lizard_models.linearize(model, LizardConfig.preset(...))"
        )
    return LizardConfig.from_dict(config.lizard)


def converted_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers that are not kept softmax. Raises ValueError for an index the model does not have."""
    kept = lizard_config(config).softmax_layers
    if any(i >= config.num_hidden_layers for i in kept):
        raise ValueError(f"softmax_layers={list(kept)}, but the model has layers 0 to {config.num_hidden_layers - 1}")
    return [i for i in range(config.num_hidden_layers) if i not in kept]


def attention_config(config: PreTrainedConfig) -> AttentionConfig:
    """Shape and choices of every converted layer. Raises ValueError for a window wider than the teacher's own."""
    choices = lizard_config(config).attention
    sliding_window = getattr(config, "sliding_window", None)
    if sliding_window is not None and choices.window > sliding_window:
        raise ValueError(
            f"attention.window={choices.window} is wider than the teacher's sliding window of {sliding_window}"
        )
    return AttentionConfig.from_choices(
        choices,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )
