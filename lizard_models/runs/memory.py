"""What a Lizard model adds to its teacher, and what a sequence costs in memory, from configurations alone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lizard_layers import empty_state, state_bytes
from lizard_models.config import LizardConfig
from lizard_models.files.sources import expanded
from lizard_models.model.layer_configs import (
    attention_config,
    converted_layers,
    head_dim,
    kept_layers,
    lizard_config,
    sliding_windows,
)
from lizard_models.model.linearize import student_config
from lizard_models.model.modes import LizardModelMixin
from lizard_models.teachers.find import find_teacher
from lizard_models.teachers.loading import TRAINING, read_record

LENGTHS = (8192, 32_768, 131_072)


def cache_bytes(
    config: PreTrainedConfig, length: int, dtype: torch.dtype, layers: Collection[int] | None = None
) -> int:
    """Bytes of keys and values that softmax layers keep for one sequence of ``length`` tokens.

    layers: their indices, all by default. A sliding layer keeps the window - 1 keys that the next token can see.
    """
    windows = sliding_windows(config)
    chosen = [windows[i] for i in (range(len(windows)) if layers is None else layers)]
    kept = sum(length if window is None else min(length, window - 1) for window in chosen)
    return 2 * kept * config.num_key_value_heads * head_dim(config) * dtype.itemsize


def lizard_bytes(config: PreTrainedConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes that a Lizard model keeps for one sequence; the same at any length unless some layers stay softmax."""
    converted, kept = converted_layers(config), kept_layers(config)
    states = (empty_state(attention_config(config, i), 1, dtype, device="meta") for i in converted)
    return sum(map(state_bytes, states)) + cache_bytes(config, length, dtype, kept)


def kept_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of ``lizard_bytes``, those that kept keys and their scores take."""
    plain = copy.deepcopy(config)
    plain.lizard = lizard_config(config).replace(attention={"kept_keys": 0}).to_dict()
    return lizard_bytes(config, 0, dtype) - lizard_bytes(plain, 0, dtype)


def constant_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Of ``lizard_bytes``, those that do not grow: all but those of layers kept softmax without a window."""
    windows, kept = sliding_windows(config), kept_layers(config)
    growing = [i for i in kept if windows[i] is None]
    length = max((window or 0) for window in [*windows, 0])
    return lizard_bytes(config, length, dtype) - cache_bytes(config, length, dtype, growing)


def told_places(config: PreTrainedConfig) -> str:
    """How many keys are kept where, in words. config: of a Lizard model."""
    kept = [attention_config(config, i) for i in converted_layers(config)]
    counts = [n for layer in kept for n in layer.kept_by_head]
    if len(set(counts)) == 1:
        return f"{counts[0]:,} of each key head in every linearized layer"
    some = sum(1 for layer in kept if layer.keeps_keys)
    spread = f"{min(counts):,} to {max(counts):,} of a key head, {sum(counts):,} in all"
    return f"{spread}, in {some} of {len(kept)} linearized layers"


def count_parameters(config: PreTrainedConfig) -> tuple[int, int]:
    """(all, new) parameters of a Lizard model, tied ones once. No memory is taken."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, LizardModelMixin)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for _, p in model.lizard_parameters())


def memory_table(
    config: PreTrainedConfig, lengths: Sequence[int] = LENGTHS, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> Table:
    """Bytes of one sequence by its length, the teacher's cache and the Lizard's state, for each dtype of the keys.

    config: of a Lizard model. The sums of the linear branch are float32 in any dtype.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    table = Table(title=f"memory of one sequence, {' and '.join(names)}", title_justify="left")
    table.add_column("tokens", justify="right")
    for name in names:
        of = f", {name}" if len(names) > 1 else ""
        for column in (f"teacher's cache{of}", f"Lizard's state{of}", "ratio"):
            table.add_column(column, justify="right")
    for length in lengths:
        cells = []
        for dtype in dtypes:
            teacher, student = cache_bytes(config, length, dtype), lizard_bytes(config, length, dtype)
            cells += [*(f"{size / 2**20:,.1f} MiB" for size in (teacher, student)), f"{teacher / student:,.1f}x"]
        table.add_row(f"{length:,}", *cells)
    return table


def describe(
    name: str,
    *,
    preset: str | None = None,
    changes: dict[str, Any] | None = None,
    lengths: Sequence[int] = LENGTHS,
    cache: str | None = None,
) -> list[str | Table]:
    """What ``lizard-attn info`` prints about a linearized model, or about a teacher under a preset.

    lengths: of the sequences whose memory is shown. Raises ValueError for an unknown model or preset, or a preset given
    for a model that is linearized already.
    """
    config = _config_of(name, preset, changes or {}, cache)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    everything, new = count_parameters(config)
    converted, chosen = len(converted_layers(config)), lizard_config(config)
    lines = [
        f"{name}: preset {chosen.name}, {converted} of {config.num_hidden_layers} layers linearized",
        f"parameters: {everything:,}, of which {new:,} are new ({new / everything:.2%})",
    ]
    lines += [f"trained: {told}"] if (told := _told_stages(expanded(name, "teacher") / TRAINING)) else []
    if chosen.attention.keeps_keys:
        size = kept_bytes(config, dtype) / 2**20
        lines.append(f"kept keys: {told_places(config)}, {size:,.1f} MiB of the state")
    return [*lines, memory_table(config, lengths, [dtype])]


def _told_stages(path: Path) -> str:
    """The stages of a saved model, by what its run recorded. Raises ValueError for a record that is damaged."""
    record = read_record(path)
    try:
        recipes, stages = record.get("config", {}), record.get("stages", {})
        told = [
            f"{name} {stage['steps']:,} steps of {recipe['batch_size']} x {recipe['sequence_length']:,} tokens"
            for name, stage in stages.items()
            for recipe in [recipes[name]]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged (its stages cannot be read): copy the model again") from error
    return ", ".join(told)


def _config_of(name: str, preset: str | None, changes: dict[str, Any], cache: str | None) -> PreTrainedConfig:
    folder = expanded(name, "teacher")
    if (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(folder)
        if config.model_type.startswith("lizard"):
            if preset is not None or changes:
                raise ValueError(f"model {name!r} is linearized already: preset and settings are for teachers")
            return config
    _, teacher = find_teacher(name, cache=cache)
    return student_config(teacher, LizardConfig.preset(preset or "recommended").replace(**changes))
