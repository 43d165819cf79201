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

    "linear" leaves alpha times the window of a sum, and the window alone of a merge. "window" leaves the linear branch;
    positions that have no key outside the window keep it in a merge, as they have nothing else. Layers kept softmax
    stay.

    Raises ValueError for another branch, or a model without a linear branch.
    """
    if branch not in ("linear", "window"):
        raise ValueError(f"branch must be linear or window, got {branch!r}")
    layers = [attention.lizard for attention in model.lizard_attentions()]
    if not layers or not layers[0].config.linear_branch:
        raise ValueError("the model has no linear branch, so there are no branches to switch off")
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_without_linear(layer) if branch == "linear" else _without_window(layer))
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
    mix = layer.mix
    if layer.config.mix == "sum":
        fixed: dict[str, Tensor | float] = {"alpha": 0.0}
    else:
        device = next(layer.parameters()).device
        fixed = {"merge_bias": torch.full((layer.config.num_heads,), 1e4, device=device)}
    layer.mix = _Fixed(fixed)  # type: ignore[assignment]
    try:
        yield
    finally:
        layer.mix = mix
