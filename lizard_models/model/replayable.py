"""Whether what a model computes may be replayed without its Python, and what such a replay depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lizard_models.model.cache import LizardCache
from lizard_models.model.hooks import is_hooked

PLAIN = ("torch", "transformers", "lizard_layers", "lizard_models")  # packages whose modules hide no choice in Python


def key_of(model: nn.Module) -> tuple[Any, ...]:
    """What a captured forward depends on beside its cache: where the weights lie, and the choices that Python makes.

    One walk through the modules, since every reading asks: ``parameters()`` and ``buffers()`` take longer.
    """
    weights: list[Any] = []
    left = [model]
    while left:
        module = left.pop()
        own = module.__dict__
        for t in (*own["_parameters"].values(), *own["_buffers"].values()):
            if t is not None:
                weights += (t.data_ptr(), t.dtype)
        weights.append(type(module))
        if is_changed(module, model):
            weights.append(id(module))
        left.extend(m for m in own["_modules"].values() if m is not None)
    choices = tuple((a.mode, a.lizard.config) for a in model.lizard_attentions())  # type: ignore[operator]
    flags = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), model.training
    return tuple(weights), choices, flags


def is_changed(module: nn.Module, model: nn.Module) -> bool:
    """Whether more than its class says what this part of a model does. Hooks of the model itself run around it."""
    hooked = module is not model and is_hooked(module)
    return hooked or "_hf_hook" in module.__dict__ or module._compiled_call_impl is not None


def is_plain(model: nn.Module) -> bool:
    """Whether all of its parts are of packages that hide no choice in Python, so that a key says everything."""
    return all(type(m).__module__.split(".")[0] in PLAIN for m in model.modules())


def why_not(model: Any, cache: Any) -> str | None:
    """Why forwards with this cache cannot be captured, or None."""
    if not isinstance(cache, LizardCache):
        return "there is no cache of the model's own"
    if model.model.has_softmax_layers:
        return "kept softmax layers have keys and values that grow"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if getattr(model, "hf_quantizer", None) is not None:
        return "the weights are quantised"
    if any(layer.record_past for layer in cache.lizard_layers()):
        return "the cache records its past"
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter:
            return f"{name} is a {type(p).__name__}"
        if p.device != model.device:
            return f"{name} is on {p.device}, the model on {model.device}"
    for name, module in model.named_modules():
        if module is not model and is_hooked(module) or hasattr(module, "_hf_hook"):
            return f"{name or 'the model'} has hooks or a forward of its own"
        if module._compiled_call_impl is not None:
            return f"{name or 'the model'} is compiled"
    return None
