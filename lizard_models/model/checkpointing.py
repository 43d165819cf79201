"""Gradient checkpointing, under which transformers' layers take no cache: when it is on, and off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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
