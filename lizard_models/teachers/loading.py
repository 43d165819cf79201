"""Saved models, linearized or not, with their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

import lizard_models.model.families  # noqa: F401  registers them with the Auto classes
from lizard_models.files.folders import SUMS, damaged
from lizard_models.files.records import read_json
from lizard_models.files.sources import expanded, hub_answers
from lizard_models.model.layer_configs import lizard_config
from lizard_models.model.safe_loading import load_causal_lm, read_config
from lizard_models.teachers.find import find_teacher, load_tokenizer, local_snapshot

TRAINING = "training.json"


class LoadedModel(NamedTuple):
    """A model in eval mode, frozen; its tokenizer if it has one; the record of its training, empty if unknown."""

    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    training: dict[str, Any]


def load_model(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    what: str = "model",
    positions: str | None = None,
    cache: str | None = None,
) -> LoadedModel:
    """Loads a folder that ``lizard-attn linearize`` wrote, or any causal language model by folder or hub name.

    ``smollm2-135m`` is taken from where ``find_teacher`` finds it, with ``cache``. dtype: None is the saved one. what:
    what error messages call it. positions: "true" or "clamped" in place of what the model was saved with;
    with "true" there is no limit, and no kept key is dropped. Only safetensors are read, and no code that comes with
    the model is run.

    Raises ValueError for a folder without config.json, a name that cannot be read, weights that are not in safetensors,
    a file that is missing, damaged or cut short, a config of a newer version, positions for a model that is not
    linearized, and what ``from_pretrained`` raises.
    """
    folder = expanded(name_or_path, what)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{what} {name_or_path!r} has no config.json; wanted the folder of a saved model")
    source = str(folder) if folder.exists() else _named(name_or_path, what, cache)
    folder = Path(source)
    if folder.exists():
        if bad := damaged(folder):
            raise ValueError(
                f"{what} {name_or_path!r}: {', '.join(bad)} is damaged or cut short, or changed since it was saved "
                f"(another sha256 than in {SUMS}): copy the model again, or delete {SUMS} if the change is yours"
            )
        _check_version(folder)
    try:
        config = read_config(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {name_or_path!r} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if positions is not None:
        if getattr(config, "lizard", None) is None:
            raise ValueError(f"positions: got {positions!r}, but {what} {name_or_path!r} is not a linearized model")
        limits = {} if positions == "clamped" else {"position_limit": None, "position_step": None, "kept_past": "moved"}
        config.lizard = lizard_config(config).replace(attention={"positions": positions, **limits}).to_dict()
    model: Any = load_causal_lm(source, dtype or "auto", what, config=config)
    model = model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, load_tokenizer(source), read_record(folder / TRAINING))


def _named(name: str, what: str, cache: str | None) -> str:
    """Where the model of that name can be loaded from: the hub, its local copy, or the packaged teacher's folder."""
    if name == "smollm2-135m":
        return find_teacher(name, cache=cache)[0]
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{what} {name!r} is not a folder; make one with `lizard-attn linearize`")
    if hub_answers():
        return name
    if local := local_snapshot(name):
        return local
    raise ValueError(f"{what} {name!r} is not a folder, and the hub does not answer; give the folder of a saved model")


def _check_version(folder: Path) -> None:
    kind = read_record(folder / "config.json").get("model_type", "")
    if kind.startswith("lizard_") and kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder / 'config.json'} is of a {kind!r} model, which this version does not know: update lizard-attn"
        )


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model, empty without a file. Raises ValueError for another one."""
    record = read_json(path, "copy the model again") if path.is_file() else {}
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged (it holds no object of JSON): copy the model again")
    return record
