"""Which teachers can become a Lizard, and why another cannot."""

from __future__ import annotations

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.families import FAMILIES, load_family

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def family_of(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> type[LizardCausalLM]:
    """The class that a teacher of this config becomes. Raises ValueError that names what is missing.

    model: the teacher, where there is one; it must be its family's causal language model.
    """
    kind = getattr(config, "model_type", "")
    if kind not in FAMILIES:
        raise ValueError(f"{missing(config)}; {supported()}")
    family = load_family(kind)
    if model is not None and not isinstance(model, family.__bases__[-1]):
        raise ValueError(
            f"it is a {type(model).__name__}, without the head that predicts the next token; "
            f"wanted a {family.__bases__[-1].__name__}"
        )
    return family


def supported() -> str:
    """What can be converted, for error messages."""
    return f"supported are {', '.join(FAMILIES)}"


def missing(config: PreTrainedConfig) -> str:
    """What stands between an unsupported teacher and a Lizard, found in the model that its config describes."""
    kind = getattr(config, "model_type", "")
    if kind.startswith("lizard_"):
        return f"its type {kind!r} is linearized already"
    if hasattr(config, "text_config"):
        return f"its type {kind!r} reads more than text: give its language model alone"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return f"its type {kind!r} is no causal language model of transformers"
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    attentions = [m for name, m in model.named_modules() if name.endswith(("attn", "attention", "mixer"))]
    for attention in attentions:
        if lacking := [p for p in PROJECTIONS if not isinstance(getattr(attention, p, None), nn.Linear)]:
            return f"its {type(attention).__name__} has no separate {', '.join(lacking)}"
    if not attentions:
        return f"its type {kind!r} has no attention layers"
    return f"no adapter says yet how type {kind!r} makes queries and keys of its projections"
