"""What a transformers config says about the layers of a Lizard model."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig

from lizard_layers import AttentionChoices, AttentionConfig
from lizard_models.config import LizardConfig

MOST_READ = 64
_read: dict[str, LizardConfig] = {}  # checking one takes longer than a layer, and every new cache asks for one


def lizard_config(config: PreTrainedConfig) -> LizardConfig:
    """The ``LizardConfig`` inside a transformers config. Raises ValueError where there is none."""
    if getattr(config, "lizard", None) is None:
        raise ValueError(
            f"{type(config).__name__} has no Lizard choices (its field lizard is None): "
            "convert a teacher with lizard_models.linearize(model, LizardConfig.preset(...))"
        )
    if torch.compiler.is_compiling():
        return LizardConfig.from_dict(config.lizard)
    written = repr(config.lizard)
    read = _read.get(written)
    if read is None:
        if len(_read) >= MOST_READ:
            _read.clear()
        read = _read[written] = LizardConfig.from_dict(config.lizard)
    return read


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of an attention head; some families leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """The teacher's own window of each layer, its query included; None where it attends to everything."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def kept_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers that keep the teacher's softmax attention: by list, by share, and sliding ones.

    Raises ValueError for an index the model does not have, and for a wide layer among the kept ones.
    """
    chosen, layers = lizard_config(config), range(config.num_hidden_layers)
    if any(i not in layers for i in chosen.softmax_layers):
        raise ValueError(
            f"softmax_layers={list(chosen.softmax_layers)}, but the model has layers 0 to {len(layers) - 1}"
        )
    if any(i not in layers for i in chosen.wide_layers):
        raise ValueError(f"wide_layers={list(chosen.wide_layers)}, but the model has layers 0 to {len(layers) - 1}")
    windows, keep = sliding_windows(config), chosen.keep_sliding_layers
    if keep is None:
        keep = None in windows
    sliding = [i for i in layers if keep and windows[i] is not None]
    shared = evenly_placed([i for i in layers if i not in sliding], chosen.softmax_share)
    kept = sorted({*chosen.softmax_layers, *sliding, *shared})
    if both := sorted(set(kept) & set(chosen.wide_layers)):
        raise ValueError(f"wide_layers: layers {both} are kept softmax or sliding, which have no window of this kind")
    by_layer = kept_by_layer(config)
    if chosen.attention.by_layer and (both := [i for i in kept if any_places(by_layer[i])]):
        raise ValueError(
            f"attention.kept_keys: layers {both} are kept softmax or sliding, which keep every key they have"
        )
    return kept


def kept_by_layer(config: PreTrainedConfig) -> list[int | tuple[int, ...]]:
    """``attention.kept_keys`` of every layer of the model, converted or not: a number, or one per key head.

    Raises ValueError for a list of another number of layers than the model has.
    """
    choices, layers = lizard_config(config).attention, config.num_hidden_layers
    kept: Any = choices.kept_keys
    if not choices.by_layer:
        return [kept] * layers
    if len(kept) != layers:
        raise ValueError(f"attention.kept_keys has lists for {len(kept)} layers, but the model has {layers}")
    return [places or 0 for places in kept]


def any_places(kept_keys: int | tuple[int, ...]) -> bool:
    """Whether a layer keeps keys."""
    return any(kept_keys) if isinstance(kept_keys, tuple) else kept_keys > 0


def evenly_placed(layers: list[int], share: float) -> list[int]:
    """``share`` of the layers, rounded, at least one unless the share is 0: the middle of each of that many pieces."""
    count = max(1, round(share * len(layers))) if share and layers else 0
    return [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]


def converted_layers(config: PreTrainedConfig) -> list[int]:
    """Indices of the layers that are not kept softmax. Raises as ``kept_layers``."""
    kept = kept_layers(config)
    return [i for i in range(config.num_hidden_layers) if i not in kept]


def stretched_gate(choices: AttentionChoices, stretch: float) -> dict[str, Any]:
    """The changes of ``choices`` that divide a gate's log-decays by ``stretch`` and leave its parameters' starts."""
    start = choices.gate_init
    return {
        "gate_temperature": choices.gate_temperature * stretch,
        "gate_init": None if start is None else start ** (1 / stretch),
    }


def attention_config(
    config: PreTrainedConfig,
    layer_idx: int | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    rope: bool = True,
) -> AttentionConfig:
    """Shape and choices of a converted layer; without an index, those of layers that are not wide, and without kept
    keys where each layer has its own.

    scale: factor of the scores, None for the usual head_dim**-0.5. softcap: their bound, None for none. rope: False for
    a layer without positions (NoPE). Raises ValueError for a window wider than the layer's own.
    """
    chosen = lizard_config(config)
    choices, name = chosen.attention, "attention.window"
    if layer_idx in chosen.wide_layers:
        slower = stretched_gate(choices, chosen.wide_gate_stretch)
        choices, name = dataclasses.replace(choices, window=chosen.wide_window, **slower), "wide_window"
    if choices.by_layer:
        choices = dataclasses.replace(choices, kept_keys=0 if layer_idx is None else kept_by_layer(config)[layer_idx])
    own = None if layer_idx is None else sliding_windows(config)[layer_idx]
    if own is not None and choices.window > own:
        raise ValueError(
            f"{name}={choices.window} is wider than the teacher's sliding window of {own} "
            f"in layer {layer_idx}: give a narrower one, or keep_sliding_layers=True"
        )
    if not rope:
        choices = dataclasses.replace(choices, window_rope=False, linear_rope=False)
    return AttentionConfig.from_choices(
        choices,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_key_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        scale=scale,
        softcap=softcap,
    )


def has_context(config: PreTrainedConfig) -> bool:
    """Whether a layer kept softmax attends to everything, so that the teacher's context is a limit still."""
    windows = sliding_windows(config)
    return any(windows[i] is None for i in kept_layers(config))
