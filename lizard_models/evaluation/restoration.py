"""What restoring single layers to softmax attention saves: which layers to keep softmax."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lizard_models.evaluation.position_loss import divergences, float32_head
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.layer_configs import converted_layers


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
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """KL to the teacher on ``tokens`` [N, T + 1], mean over positions, and how much of it each layer alone saves.

    Returns {"kl": nats, "saved": {layer: nats}, "order": layers from the most saved to the least} (after
    arXiv 2512.20569, which finds this choice better than an even spread and than one by stage 1 error). advance: called
    with the number of forwards done and that of all.

    Layers before the restored one compute what they would without it, so they run once a batch.
    """
    converted = converted_layers(model.config)
    device = next(model.parameters()).device
    decoder, head, teacher_head = model.model, float32_head(model), float32_head(teacher)
    batches = tokens.split(batch_size)
    sums = torch.zeros(1 + len(converted), dtype=torch.float64)
    for count, batch in enumerate(part.to(device) for part in batches):
        with _inputs_of(decoder.layers) as inputs:
            states = [decoder(input_ids=batch, use_cache=False).last_hidden_state]
        for layer in converted:
            with restored(model, [layer]), _known_until(decoder.layers, layer, inputs[layer]):
                states.append(decoder(input_ids=batch, use_cache=False).last_hidden_state)
            advance(count * len(converted) + len(states) - 1, len(batches) * len(converted))
        wanted = teacher.model(input_ids=batch, use_cache=False).last_hidden_state
        kl = divergences([state[:, :-1] for state in states], head, wanted[:, :-1], teacher_head)
        sums += kl.double().sum((1, 2)).cpu()
    whole, *rest = (sums / (tokens.shape[0] * (tokens.shape[1] - 1))).tolist()
    saved = {layer: whole - kl for layer, kl in zip(converted, rest, strict=True)}
    return {"kl": whole, "saved": saved, "order": sorted(saved, key=lambda layer: -saved[layer])}


@contextlib.contextmanager
def _inputs_of(layers: Any) -> Iterator[list[Tensor]]:
    """Within: the hidden states that reach each of the layers, as they run."""
    inputs: list[Tensor] = []

    def note(module: Any, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _known_until(layers: Any, first: int, hidden: Tensor) -> Iterator[None]:
    """Within: the layers before ``first`` compute nothing and hand on ``hidden``, its input."""
    before = [layer.__dict__.get("forward") for layer in layers[:first]]
    for layer in layers[:first]:
        layer.forward = lambda *args, **kwargs: hidden
    try:
        yield
    finally:
        for layer, forward in zip(layers[:first], before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward
