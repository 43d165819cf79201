"""A wider window for single layers of a model that is converted already, and which layers need it most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from lizard_models.evaluation.restoration import restoration_savings
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.layer_configs import converted_layers, kept_layers, lizard_config
from lizard_models.model.positions import position_range


def widen(model: LizardCausalLM, layers: Sequence[int], window: int | None = None) -> None:
    """Gives converted layers a window of ``window`` keys, as if they had been ``wide_layers`` from the start.

    No parameter depends on the window, so a model can be widened after stage 1, when it is known which layers need it.
    window: default the model's own ``wide_window``. Log-decays are divided by the model's ``wide_gate_stretch``. Layers
    that are wide already stay so, and get this window too. Caches made before no longer fit.

    Raises ValueError for layers that are not converted, and for a window that is narrower than the other layers' or
    wider than a layer's own sliding window. The model is then as it was.
    """
    chosen = lizard_config(model.config)
    wide = sorted({*chosen.wide_layers, *layers})
    before = model.config.lizard
    model.config.lizard = chosen.replace(
        wide_layers=wide, wide_window=chosen.wide_window if window is None else window
    ).to_dict()
    try:
        kept_layers(model.config)
        attentions = dict(zip(converted_layers(model.config), model.lizard_attentions(), strict=True))
        configs = {i: attentions[i].hybrid_config() for i in wide}
        decoder: Any = model.model
        decoder.position_range = position_range(model.config)
    except ValueError:
        model.config.lizard = before
        raise
    for i, config in configs.items():
        layer = attentions[i].lizard
        layer.config = config
        gate: Any = layer.gate if config.linear_branch else None
        if hasattr(gate, "temperature"):
            gate.temperature = config.gate_temperature


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
