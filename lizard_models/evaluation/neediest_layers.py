"""Which layers need a wider window most."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from lizard_models.evaluation.restoration import restoration_savings
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.layer_configs import converted_layers, lizard_config


def check_widen(config: PreTrainedConfig, count: int, length: int) -> None:
    """Raises ValueError where a run could not widen ``count`` layers that it chooses on texts of ``length`` tokens:
    what ``check_count`` refuses, and wide layers that are named already. config: of the student."""
    if named := lizard_config(config).wide_layers:
        raise ValueError(f"widen: got wide_layers={list(named)} as well, wanted one of the two")
    check_count(config, count, length)


def check_count(config: PreTrainedConfig, count: int, length: int) -> None:
    """Raises ValueError where ``neediest_layers`` could not choose ``count`` layers on texts of ``length`` tokens."""
    converted = len(converted_layers(config))
    if not 1 <= count <= converted:
        raise ValueError(f"widen: got {count} layers, wanted 1 to {converted}, those that are converted")
    choices = lizard_config(config).attention
    exact = choices.window + choices.anchors
    if length <= exact:
        raise ValueError(
            f"widen: got texts of {length} tokens to choose layers on, wanted more than the {exact} of window and "
            "anchors, in which nothing is lost"
        )


def neediest_layers(
    model: LizardCausalLM,
    teacher: Any,
    tokens: Tensor,
    count: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[int]:
    """Indices, in order, of the ``count`` converted layers whose own attention, put back, saves most KL to the teacher.

    model: after stage 1, its other weights the teacher's. tokens [N, T + 1]; advance: as in
    ``restoration_savings``. Raises what ``check_count`` does.
    """
    check_count(model.config, count, tokens.shape[1] - 1)
    return sorted(restoration_savings(model, teacher, tokens, advance=advance)["order"][:count])
