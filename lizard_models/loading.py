"""Saved models, linearized or not, with their tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

import lizard_models  # noqa: F401  registers the Lizard families with the Auto classes
from lizard_models.downloads import hub_answers
from lizard_models.layer_configs import lizard_config
from lizard_models.teachers import load_tokenizer

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
) -> LoadedModel:
    """Loads a folder that ``lizard-attn linearize`` wrote, or any causal language model by folder or hub name.

    dtype: None is the saved one. what: what error messages call it. positions: "true" or "clamped" in place of what the
    model was saved with. Raises ValueError for a folder without config.json, a name that cannot be read, or positions
    for a model that is not linearized.
    """
    folder = Path(name_or_path).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{what} {name_or_path!r} has no config.json; wanted the folder of a saved model")
    if not folder.exists() and (name_or_path.count("/") != 1 or not hub_answers()):
        raise ValueError(f"{what} {name_or_path!r} is not a folder; make one with `lizard-attn linearize`")
    source = str(folder) if folder.exists() else name_or_path
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {name_or_path!r} cannot be read: {str(error).strip().splitlines()[0]}") from error
    if positions is not None:
        if getattr(config, "lizard", None) is None:
            raise ValueError(f"--positions {positions}: {what} {name_or_path!r} is not a linearized model")
        limits = {} if positions == "clamped" else {"position_limit": None, "position_step": None}
        config.lizard = lizard_config(config).replace(attention={"positions": positions, **limits}).to_dict()
    model: Any = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype or "auto")
    model = model.to(device).eval().requires_grad_(False)
    record = folder / TRAINING
    training = json.loads(record.read_text()) if record.is_file() else {}
    return LoadedModel(model, load_tokenizer(source), training)
