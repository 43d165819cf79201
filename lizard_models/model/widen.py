"""A wider window for single layers of a model that is converted already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
