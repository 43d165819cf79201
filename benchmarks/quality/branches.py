"""A linearized model with one of its two branches switched off: what each contributes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from lizard_layers import HybridAttention
from lizard_models.model.modes import LizardModelMixin

Branch = Literal["linear", "window"]


@contextlib.contextmanager
def switched_off(model: LizardModelMixin, branch: Branch) -> Iterator[None]:
    """Within: every converted layer without one branch, the other as it was.

    "linear" leaves alpha times the window of a sum, and of a merge the window alone, with the keys that are kept.
    "window" leaves the linear branch; positions that have no key in it keep the rest of a merge, as they have nothing
    else. Layers kept softmax stay.

    Raises ValueError for another branch, a model without a linear branch, or "linear" of a sum that keeps keys.
    """
    if branch not in ("linear", "window"):
        raise ValueError(f"branch must be linear or window, got {branch!r}")
    layers = [attention.lizard for attention in model.lizard_attentions()]
    if not layers or not layers[0].config.linear_branch:
        raise ValueError("the model has no linear branch, so there are no branches to switch off")
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if branch == "window":
                stack.enter_context(_without_window(layer))
            elif layer.config.kept_keys:  # which are exact where the linear branch is to say nothing
                stack.enter_context(_biased(layer, -1e4))
            else:
                stack.enter_context(_without_linear(layer))
        yield


@contextlib.contextmanager
def _without_linear(layer: HybridAttention) -> Iterator[None]:
    config, mix = layer.config, layer.mix

    def scaled(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
        alpha = mix(inputs[0])["alpha"]
        return (output[0] * alpha_of(alpha).to(output[0].dtype), *output[1:])

    hook = layer.register_forward_hook(scaled) if config.mix == "sum" else None
    layer.config = dataclasses.replace(config, linear_branch=False)
    try:
        yield
    finally:
        layer.config = config
        if hook is not None:
            hook.remove()


def alpha_of(alpha: Tensor | float) -> Tensor:
    """Alpha as a factor on heads [B, T, Hq, D]: [] or [Hq, 1]."""
    factor = torch.as_tensor(alpha)
    return factor[:, None] if factor.ndim else factor


class _Fixed(nn.Module):
    """A mix of constants."""

    def __init__(self, values: dict[str, Tensor | float]) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> dict[str, Tensor | float]:
        return self.values


@contextlib.contextmanager
def _without_window(layer: HybridAttention) -> Iterator[None]:
    if layer.config.mix == "sum":
        with _mixed(layer, {"alpha": 0.0}):
            yield
    else:
        with _biased(layer, 1e4):
            yield


@contextlib.contextmanager
def _biased(layer: HybridAttention, bias: float) -> Iterator[None]:
    """A merge with ``bias`` as the log-odds of the linear branch, whatever the masses are."""
    if layer.config.mix == "sum":
        raise ValueError('mix="sum" with kept_keys has no exact branch alone to show: wanted mix="merge"')
    device = next(layer.parameters()).device
    with _mixed(layer, {"merge_bias": torch.full((layer.config.num_heads,), bias, device=device)}):
        yield


@contextlib.contextmanager
def _mixed(layer: HybridAttention, fixed: dict[str, Tensor | float]) -> Iterator[None]:
    mix = layer.mix
    layer.mix = _Fixed(fixed)  # type: ignore[assignment]
    try:
        yield
    finally:
        layer.mix = mix
