"""What a row costs beside the row it stands beside: memory of a sequence, counted, and what else it declares."""

from __future__ import annotations

import dataclasses
import functools

from benchmarks.quality.rows import BUDGETS, ROWS, RowSpec
from lizard_layers import AttentionChoices, AttentionConfig, empty_state, state_bytes
from lizard_models.config import LizardConfig

LENGTH = 4096
MORE = 1.01  # times the memory: below it a row counts as taking as much
LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 30, 9, 3, 64  # of SmolLM2-135M, the teacher of the rows


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
    return memory_of(config_of(name))


def memory_of(config: LizardConfig, length: int = LENGTH) -> float:
    """The same of a model of that configuration, for a sequence of ``length`` tokens."""
    kept, wide = len(config.softmax_layers), len(config.wide_layers)
    taken = kept * 4 * 2 * length * KEY_HEADS * HEAD_DIM
    taken += (LAYERS - kept - wide) * _layer_bytes(config.attention)
    if wide:
        taken += wide * _layer_bytes(dataclasses.replace(config.attention, window=config.wide_window))
    return taken / 2**20


def _layer_bytes(choices: AttentionChoices) -> int:
    config = AttentionConfig.from_choices(
        choices, hidden_size=HEADS * HEAD_DIM, num_heads=HEADS, num_key_heads=KEY_HEADS, head_dim=HEAD_DIM
    )
    return state_bytes(empty_state(config, 1, device="meta"))


def costs(name: str) -> str:
    """What a row costs more than the row it stands beside, "" for nothing: better is then not enough to choose it."""
    row = ROWS[name]
    more = [row.costs] if row.costs else []
    if row.reference and memory(name) > MORE * memory(row.reference):
        more.insert(0, f"{memory(name):.1f} MiB in place of {memory(row.reference):.1f}")
    return ", ".join(more)
