"""What restoring single layers to softmax attention saves: which layers to keep softmax."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lizard_models.evaluation.position_loss import divergence_by_position, last_hidden_states
from lizard_models.modeling_common import LizardCausalLM, converted_layers


@contextlib.contextmanager
def restored(model: LizardCausalLM, layers: Sequence[int]) -> Iterator[None]:
    """Within: the converted layers with these indices attend by softmax, for forwards without a cache.

    Raises ValueError for an index that is not a converted layer's.
    """
    converted = dict(zip(converted_layers(model.config), model.lizard_attentions(), strict=True))
    if unknown := sorted(set(layers) - set(converted)):
        raise ValueError(f"layers {unknown} are not converted layers of the model")
    decoder: Any = model.model
    before = decoder.has_softmax_layers
    decoder.has_softmax_layers = True  # so that masks are made
    for layer in layers:
        converted[layer].mode = "teacher"
    try:
        yield
    finally:
        decoder.has_softmax_layers = before
        for layer in layers:
            converted[layer].mode = "student"


@torch.no_grad()
def restoration_savings(
    model: LizardCausalLM,
    teacher: Any,
    tokens: Tensor,
    batch_size: int = 1,
    advance: Callable[[int], None] = lambda layer: None,
) -> dict[str, Any]:
    """KL to the teacher on ``tokens`` [N, T + 1], mean over positions, and how much of it each layer alone saves.

    Returns {"kl": nats, "saved": {layer: nats}, "order": layers from the most saved to the least} (after
    arXiv 2512.20569, which finds this choice better than an even spread and than one by stage 1 error). advance: called
    with each layer that is done.
    """

    states = last_hidden_states(teacher, tokens, batch_size)

    def mean() -> float:
        return divergence_by_position(model, teacher, tokens, batch_size, states).past(0)

    whole = mean()
    saved = {}
    for layer in converted_layers(model.config):
        with restored(model, [layer]):
            saved[layer] = whole - mean()
        advance(layer)
    return {"kl": whole, "saved": saved, "order": sorted(saved, key=lambda layer: -saved[layer])}
