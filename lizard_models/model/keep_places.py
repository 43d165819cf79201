"""Other numbers of kept keys for a model whose scores are fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.layer_configs import converted_layers, kept_layers, lizard_config
from lizard_models.model.positions import moves_anchors


def keep_places(model: LizardCausalLM, places: Sequence[Sequence[int]]) -> None:
    """Gives the key heads of every layer so many places, as if the model had had them from the start.

    No parameter depends on them but the scores: a layer without any place loses its own. places: a list for each layer
    of the model, empty for one kept softmax. Caches made before no longer fit.

    Raises ValueError for numbers that do not fit the model, and places in a layer without a score. The model is then as
    it was.
    """
    before, chosen = model.config.lizard, lizard_config(model.config)
    model.config.lizard = chosen.replace(attention={"kept_keys": [list(heads) for heads in places]}).to_dict()
    attentions = model.lizard_attentions()
    try:
        kept_layers(model.config)
        configs = [attention.hybrid_config() for attention in attentions]
        unscored = [
            layer
            for layer, attention, config in zip(converted_layers(model.config), attentions, configs, strict=True)
            if config.kept_keys and attention.lizard.key_score is None
        ]
        if unscored:
            raise ValueError(f"places: layers {unscored} have no scores of keys, wanted 0 places there")
    except ValueError:
        model.config.lizard = before
        raise
    for attention, config in zip(attentions, configs, strict=True):
        attention.lizard.config = config
        if not config.kept_keys:
            attention.lizard.key_score = None
    decoder: Any = model.model
    decoder.moves_anchors = moves_anchors(model.config)
