"""What a row costs beside the row it stands beside: memory of a sequence, counted, and what else it declares."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.quality.rows import BUDGETS, ROWS, RowSpec
from lizard_models.config import LizardConfig
from lizard_models.model.linearize import student_config
from lizard_models.runs.memory import lizard_bytes

LAYERS = 30
LENGTH = 4096
MORE = 1.01  # times the memory: below it a row counts as taking as much
SHAPE: dict[str, Any] = {  # of SmolLM2-135M, the teacher of the rows
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}


def spec_of(name: str) -> RowSpec:
    """A declared row for the shape above; where its layers are chosen by a measurement, as many others."""
    return ROWS[name].spec(range(LAYERS), LAYERS)


@functools.cache
def config_of(name: str) -> LizardConfig:
    """The configuration of a declared row, see ``spec_of``."""
    return spec_of(name).config(BUDGETS["quick"], LAYERS)


@functools.cache
def memory(name: str) -> float:
    """MiB that the model of a declared row keeps for one sequence of ``LENGTH`` tokens, keys in float32.

    Only layers kept softmax take more for a longer one.
    """
    return lizard_bytes(student_config(LlamaConfig(**SHAPE), config_of(name)), LENGTH, torch.float32) / 2**20


def costs(name: str) -> str:
    """What a row costs more than the row it stands beside, "" for nothing: better is then not enough to choose it."""
    row = ROWS[name]
    more = [row.costs] if row.costs else []
    if row.reference and memory(name) > MORE * memory(row.reference):
        more.insert(0, f"{memory(name):.1f} MiB in place of {memory(row.reference):.1f}")
    return ", ".join(more)
