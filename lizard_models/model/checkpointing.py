"""Gradient checkpointing, under which transformers' layers take no cache: as training asks for it, on, and off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def run_layers_again(model: Any, *, captured: bool = False) -> None:
    """Gradient checkpointing for training, until ``gradient_checkpointing_disable``: all layers of a causal language
    model but the last are run again in the backward.

    What the last one keeps is there when its own backward begins, at once and before any other layer is run again,
    which takes as much; so nothing is gained by letting go of it. captured: the step is to be a CUDA graph, which may
    not read the generators' states, and draws nothing.
    """
    kept = {"preserve_rng_state": False} if captured else {}
    model.gradient_checkpointing_enable({"use_reentrant": False} | kept)
    model.model.layers[-1].gradient_checkpointing = False


def checkpointed_layers(decoder: Any) -> list[Any]:
    """The layers of a decoder that would be run again in the backward."""
    return [layer for layer in decoder.layers if layer.training and getattr(layer, "gradient_checkpointing", False)]


@contextlib.contextmanager
def without_checkpointing(decoder: Any) -> Iterator[None]:
    """Without gradients nothing is run again, so layers in training mode may fill a cache, as in generate."""
    changed = [] if torch.is_grad_enabled() else checkpointed_layers(decoder)
    if changed and decoder.gradient_checkpointing:
        changed.append(decoder)
    for module in changed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in changed:
            module.gradient_checkpointing = True
