"""A plan as a complete recipe file, with a comment on every key."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from lizard_models.config import LizardConfig
from lizard_models.presets import PRESETS
from lizard_models.runs.plan import Plan
from lizard_models.runs.recipe_keys import SECTIONS, Key, keys, wanted, written

WIDTH = 98


def preset_recipe(name: str) -> str:
    """A complete recipe file of a preset, for smollm2-135m. Raises ValueError for an unknown preset."""
    config = LizardConfig.preset(name)
    data = preset_data(config)
    defaults = {key.target[0]: key.default for key in keys().values() if key.name == "evaluation.length"}
    return show(Plan(teacher="smollm2-135m", config=config, out=Path("my-lizard"), data=data, **defaults))


def preset_data(config: LizardConfig) -> list[str]:
    """The data sets that a configuration names, for a plan that gives none."""
    return sorted({config.stage1.dataset, config.stage2.dataset})


def show(plan: Plan) -> str:
    """The recipe file that ``read_recipe`` reads as this plan, ``resume`` left out."""
    lines = ["# A recipe of lizard-attn: lizard-attn run FILE does what of it is missing.", "#"]
    lines += _comment("Every key is here. One that is left out has the value that the preset gives it.")
    for section, about in SECTIONS.items():
        lines += ["", *_comment(about), *([f"{section}:"] if section else [])]
        for key in (key for key in keys().values() if key.section == section):
            indent = "  " if section else ""
            lines += ["", *(indent + line for line in _comment(f"{_words(key.doc)} [{wanted(key.hint)}]"))]
            lines.append(f"{indent}{key.name.rpartition('.')[2]}: {written(value_of(plan, key))}")
    return "\n".join(lines) + "\n"


def value_of(plan: Plan, key: Key) -> Any:
    """What a plan has where a key of a recipe file sets it, as the file has it."""
    name = plan.config.name
    if key.name == "preset":
        return name if name in PRESETS else key.default
    if key.name == "name":
        return None if name in PRESETS else name
    value: Any = plan
    for attribute in key.target:
        value = getattr(value, attribute)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, Path) else value


def _words(doc: str) -> str:
    """Documentation of a Python field in the words of a file."""
    for key in keys().values():
        if key.of_config and key.section == "budget":
            doc = re.sub(rf"``(attention\.)?{key.target[-1]}``", f"`{key.name}`", doc)
    doc = re.sub(r"\bNone\b", "null", doc.replace("``", "`"))
    return re.sub(r"\bTrue\b", "true", re.sub(r"\bFalse\b", "false", doc))


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2, break_long_words=False, break_on_hyphens=False)]
