"""Teachers and students: conversion, distillation, evaluation.

Importing this registers the Lizard families with transformers' Auto classes. What is named here loads when it is
used, a family's classes when a configuration of it is made; they are in ``lizard_models.model.families.llama`` and its
neighbours.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import lizard_models.model.families  # noqa: F401  registers

if TYPE_CHECKING:
    from lizard_models.config import LizardConfig
    from lizard_models.distill import (
        RunArguments,
        StageResult,
        TrainingInterrupted,
        train_stage0,
        train_stage1,
        train_stage2,
        train_stage3,
    )
    from lizard_models.evaluation.neediest_layers import neediest_layers
    from lizard_models.model.cache import LizardCache
    from lizard_models.model.context import context_part
    from lizard_models.model.keep_places import keep_places
    from lizard_models.model.linearize import linearize
    from lizard_models.model.prefix import PrefixStates
    from lizard_models.model.state_file import load_state, save_state
    from lizard_models.model.state_pool import StatePool
    from lizard_models.model.widen import widen
    from lizard_models.recipes import Stage0Config, Stage1Config, Stage2Config, Stage3Config
    from lizard_models.runs.convert_folder import linearize_folder
    from lizard_models.teachers.find import load_teacher
    from lizard_models.teachers.loading import load_model

_HOMES = {
    "LizardCache": "model.cache",
    "LizardConfig": "config",
    "PrefixStates": "model.prefix",
    "RunArguments": "distill",
    "Stage0Config": "recipes",
    "Stage1Config": "recipes",
    "Stage2Config": "recipes",
    "Stage3Config": "recipes",
    "StageResult": "distill",
    "StatePool": "model.state_pool",
    "TrainingInterrupted": "distill",
    "context_part": "model.context",
    "keep_places": "model.keep_places",
    "linearize": "model.linearize",
    "linearize_folder": "runs.convert_folder",
    "load_model": "teachers.loading",
    "load_state": "model.state_file",
    "load_teacher": "teachers.find",
    "neediest_layers": "evaluation.neediest_layers",
    "save_state": "model.state_file",
    "train_stage0": "distill",
    "train_stage1": "distill",
    "train_stage2": "distill",
    "train_stage3": "distill",
    "widen": "model.widen",
}

__all__ = [
    "LizardCache",
    "LizardConfig",
    "PrefixStates",
    "RunArguments",
    "Stage0Config",
    "Stage1Config",
    "Stage2Config",
    "Stage3Config",
    "StageResult",
    "StatePool",
    "TrainingInterrupted",
    "context_part",
    "keep_places",
    "linearize",
    "linearize_folder",
    "load_model",
    "load_state",
    "load_teacher",
    "neediest_layers",
    "save_state",
    "train_stage0",
    "train_stage1",
    "train_stage2",
    "train_stage3",
    "widen",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
