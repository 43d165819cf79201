"""State files: what a model remembers of a text it has read, for prompts that start from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from lizard_layers import empty_state, state_of, tensors_of
from lizard_models.config import RETIRED
from lizard_models.files.records import seal_broken, sealed
from lizard_models.files.sources import expanded
from lizard_models.model.cache import LizardCache
from lizard_models.model.cache_layer import LizardCacheLayer
from lizard_models.model.layer_configs import attention_config, kept_layers, lizard_config
from lizard_models.model.tensor_parallel import refuse_split

FORMAT, VERSION = "lizard-attn state", 1
# What may differ between the model that wrote a state and the one that reads it.
ANY_CONFIG = {
    "transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache", "lizard",
    "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "initializer_range", "quantization_config",
    "return_dict", "output_hidden_states", "output_attentions", "tie_word_embeddings", "id2label", "label2id",
}  # fmt: skip
ADDED = {  # fields that earlier versions did not write
    "attention.kept_keys": 0, "attention.score_dim": 128,
    "attention.score_received": False, "attention.score_stride": 8,
}  # fmt: skip
ANY_ATTENTION = {"impl", "positions", "position_limit", "position_step"}
PIECE = 1 << 20  # numbers summed at a time


def save_state(path: str | os.PathLike[str], model: Any, cache: LizardCache) -> int:
    """Write what ``cache`` remembers, with sums of it, of the model and of the header, into one safetensors file.

    Any number of rows; positions are kept with them. The file appears whole or not at all. Returns its bytes. Raises
    ValueError for a folder that is not there, and a cache that has read nothing, or is static with kept softmax layers.
    """
    if not isinstance(cache, LizardCache):
        raise ValueError(f"cache: got {type(cache).__name__}, wanted the LizardCache of a linearized model")
    refuse_split(model, "save_state")
    if not cache.get_seq_length():
        raise ValueError("cache: has read nothing, wanted one with a state to save")
    target = place_for(path)
    tensors = {name: t.detach().contiguous() for name, t in tensors_of_cache(cache).items()}
    metadata: dict[str, str] = {
        "format": FORMAT,
        "version": str(VERSION),
        "positions": str(cache.get_seq_length()),
        "dtype": _dtype(model),
        "config": json.dumps(comparable(model.config)),
        "weights": checksum(model.named_parameters()),
        "data": checksum(sorted(tensors.items())),
    }
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, partial, sealed(metadata))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target.stat().st_size


def place_for(path: str | os.PathLike[str]) -> Path:
    """Where ``save_state`` writes, which it replaces. Raises ValueError for a place in no folder, and for what is no
    file, such as a folder or a device."""
    target = expanded(path, "state file")
    if not target.parent.is_dir():
        raise ValueError(f"state file {str(target)!r}: there is no folder {str(target.parent)!r}")
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "no file but a device or a pipe"
        raise ValueError(f"state file {str(target)!r}: {kind} is there; wanted the name of a file")
    return target


def load_state(path: str | os.PathLike[str], model: Any) -> LizardCache:
    """The cache in a file of ``save_state``, on the device of ``model``, to go on from as often as one likes.

    ``model.generate(**cache.inputs_for(ids))`` goes on with new tokens and changes the cache: give it ``cache.copy()``
    to keep this one.

    Raises ValueError, naming the file, if it is missing, truncated, damaged, no state file or of a newer version, and
    for a model of another config, dtype or other weights than the one that wrote it.
    """
    refuse_split(model, "load_state")
    file = expanded(path, "state file")
    if not file.is_file():
        raise ValueError(f"state file {str(file)!r} does not exist")
    device = next(model.parameters()).device
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            metadata = opened.metadata() or {}
            _check_metadata(file, metadata, model)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise ValueError(f"state file {str(file)!r} is truncated or damaged: {error}") from error
    if checksum(sorted(tensors.items())) != metadata.get("data"):
        raise ValueError(f"state file {str(file)!r} is damaged: its tensors do not have the checksum it names")
    if checksum(model.named_parameters()) != metadata.get("weights"):
        raise ValueError(
            f"state file {str(file)!r} was made by a model with other weights: a state means nothing to another model, "
            "let this one read the text"
        )
    cache, seen = LizardCache(model.config), int(metadata["positions"])
    cache.padded = True  # perhaps: the states know
    try:
        fill_cache(cache, tensors, seen)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state file {str(file)!r} does not hold the layers of this model: {error}") from error
    return cache


def tensors_of_cache(cache: LizardCache) -> dict[str, Tensor]:
    """Every tensor that a cache remembers by, "layers.<i>.<field>": the cache's own, with all its rows.

    Raises ValueError for a static cache with kept softmax layers.
    """
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LizardCacheLayer):
            fields: dict[str, Any] = {} if layer.state is None else tensors_of(layer.state)
        elif isinstance(layer, DynamicLayer):
            fields = {"keys": layer.keys, "values": layer.values}
        else:
            raise ValueError(f"cache: layer {i} is a {type(layer).__name__}; a static cache cannot be saved")
        tensors |= {f"layers.{i}.{name}": t for name, t in fields.items()}
    return tensors


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of names, dtypes, shapes and contents [hex]. Contents are summed on their device.

    The bytes as 64-bit integers v_i count as sum_i v_i m_i modulo 2**64 with odd m_i, a hash of i: a change of one v_i
    always shows, exchanged ones almost surely. The same on every device.
    """
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, t in tensors:
            digest.update(f"{name} {t.dtype} {tuple(t.shape)} {_content(t.detach())}\n".encode())
    return digest.hexdigest()


def _content(t: Tensor) -> int:
    data = t.contiguous().flatten().view(torch.uint8) if t.numel() else t.new_zeros(0, dtype=torch.uint8)
    whole = data.numel() // 8 * 8
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    rest = torch.cat([data[whole:], data.new_zeros(8 - (data.numel() - whole))])
    words = data[:whole].view(torch.int64) if whole and data.storage_offset() % 8 == 0 else None
    if words is None:
        words = data[:whole].clone().view(torch.int64)
    for start in range(0, words.numel(), PIECE):
        total += _weighted(words[start : start + PIECE], start)
    return int(total + _weighted(rest.view(torch.int64), words.numel()))


def _weighted(words: Tensor, start: int) -> Tensor:
    places = torch.arange(start, start + words.numel(), device=words.device)
    mixed = (places + 1) * -7046029254386353131  # 2**64 / golden ratio, and back into 64 bits by overflow
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    return (words * (mixed | 1)).sum()


def comparable(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a config the meaning of a state depends on, flat."""
    values = {k: v for k, v in config.to_dict().items() if k not in ANY_CONFIG}
    choices = dict(getattr(config, "lizard", None) or {}).get("attention", {})
    values |= {f"attention.{k}": v for k, v in choices.items() if k not in ANY_ATTENTION}
    values["kept_layers"] = kept_layers(config)
    if getattr(config, "lizard", None) and (chosen := lizard_config(config)).wide_layers:
        values["wide_layers"] = sorted(chosen.wide_layers)
        values |= {"wide_window": chosen.wide_window, "wide_gate_stretch": chosen.wide_gate_stretch}
    return json.loads(json.dumps(values, default=str))


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _check_metadata(file: Path, metadata: dict[str, str], model: Any) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{str(file)!r} is no state file: save_state writes one")
    if not metadata.get("version", "").isdigit() or int(metadata["version"]) > VERSION:
        raise ValueError(
            f"state file {str(file)!r} has version {metadata.get('version')}, this lizard-attn reads {VERSION}: "
            "update lizard-attn"
        )
    if seal_broken(metadata):  # files of earlier versions have none
        raise ValueError(f"state file {str(file)!r} is damaged: what it says of itself does not have the sum it names")
    theirs, ours = json.loads(metadata["config"]), comparable(model.config)
    theirs, ours = RETIRED | ADDED | theirs, RETIRED | ADDED | ours  # what configs of other versions leave out
    different = [key for key in sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    if different:
        shown = ", ".join(f"{key}={theirs.get(key)!r}, here {ours.get(key)!r}" for key in different[:3])
        raise ValueError(f"state file {str(file)!r} was made by another model: {shown}")
    if metadata.get("dtype") != _dtype(model):
        raise ValueError(
            f"state file {str(file)!r} was made in {metadata.get('dtype')}, but the model is in {_dtype(model)}: load "
            "it with that dtype"
        )


def fill_cache(cache: LizardCache, tensors: dict[str, Tensor], seen: int) -> None:
    """Give a cache that has read nothing what ``tensors_of_cache`` took of one that had read ``seen`` positions.

    Kept softmax layers hold the tensors as they are, converted ones a copy. Raises KeyError, TypeError or ValueError
    where they are not those of this cache's layers.
    """
    fields: list[dict[str, Tensor]] = [{} for _ in cache.layers]
    for name, t in tensors.items():
        _, at, field = name.split(".", 2)
        fields[int(at)][field] = t
    rows = next(iter(tensors.values())).shape[0]
    for i, (layer, held) in enumerate(zip(cache.layers, fields, strict=True)):
        if isinstance(layer, LizardCacheLayer):
            state = state_of(held)
            blank = empty_state(attention_config(cache.lizard_config, i), rows, device="meta")
            came, wanted = ({name: tuple(t.shape) for name, t in tensors_of(x).items()} for x in (state, blank))
            for name in sorted({*came, *wanted}):
                if came.get(name) != wanted.get(name):
                    raise ValueError(f"{name} has shape {came.get(name)}, wanted {wanted.get(name)}")
            layer.set_state(state)
        else:
            layer.lazy_initialization(held["keys"], held["values"])
            layer.keys, layer.values = held["keys"], held["values"]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = seen
    cache.advance(seen)
