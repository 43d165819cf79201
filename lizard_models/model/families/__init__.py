"""The families of teachers: one table. Importing it registers their configurations; their classes load on use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lizard_models.model.families.configs import CONFIGS

FAMILIES = {config.model_type.removeprefix("lizard_"): config.family_file for config in CONFIGS}
"""Teachers' ``model_type`` and the file here with the classes they become."""


def load_family(model_type: str) -> Any:
    """The causal language model that a teacher of this type becomes. Raises KeyError for one that is not supported."""
    return import_module(f"{__name__}.{FAMILIES[model_type]}").CAUSAL_LM
