"""LoRA in a half-precision model: products in the model's dtype, parameters and their gradients in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def low_rank_update(y: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """y + scaling (x down^T) up^T, with products in the dtype of x and sums in float32.

    y [..., O], x [..., I] of one dtype; down [R, I] and up [O, R] float32, rounded to that dtype for the products, as
    under autocast. Result and gradient of x have their dtype, the gradients of down and up are float32. Differentiable
    any number of times.
    """
    return _LowRank.apply(y, x, down, up, scaling)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        rows, a, b = x.flatten(0, -2), down.to(x.dtype), up.to(x.dtype)
        inner = rows @ a.mT  # [N, R]
        ctx.save_for_backward(rows, inner, a, b, x, down, up)  # the last three are there anyway
        ctx.scaling, ctx.shape = scaling, x.shape
        return torch.addmm(y.flatten(0, -2), inner, b.mT, alpha=scaling).view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, a, b, x, down, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # the same, as functions of the inputs
            rows, a, b = x.flatten(0, -2), down.to(x.dtype), up.to(x.dtype)
            inner = rows @ a.mT
        of_y = grad.flatten(0, -2)
        of_inner = ctx.scaling * (of_y @ b)
        of_x = (of_inner @ a).view(ctx.shape) if ctx.needs_input_grad[1] else None
        of_up = ctx.scaling * _sum_of_products(of_y, inner)
        return grad, of_x, _sum_of_products(of_inner, rows), of_up, None


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over the tokens, not rounded to half precision where the device can leave it."""
    exact = left.is_cuda and left.dtype in (torch.bfloat16, torch.float16)
    if exact and not torch.is_grad_enabled():  # a product of another dtype has no derivative
        return torch.mm(left.mT, right, out_dtype=torch.float32)
    return (left.mT @ right).to(torch.promote_types(left.dtype, torch.float32))


class HalfPrecisionLora(Linear):
    """peft's LoRA of a linear layer, its update added with ``low_rank_update``.

    peft casts the input to float32, multiplies there and casts the sum back: more memory, and slower units of a GPU.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = self.lora_A
        down: Any = self.lora_A[name].weight
        up: Any = self.lora_B[name].weight
        return low_rank_update(self.base_layer(x), x, down, up, self.scaling[name])


def fuse_adapters(model: nn.Module) -> None:
    """Makes every plain LoRA layer of ``model`` a ``HalfPrecisionLora``, in place.

    A layer with dropout, biases, a variant of LoRA or several adapters keeps peft's forward.
    """
    for layer in model.modules():
        if type(layer) is Linear and _is_plain(layer):
            layer.__class__ = HalfPrecisionLora  # its parameters and their names stay


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of ``model`` that peft has adapted."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


@contextlib.contextmanager
def without_adapters(layers: list[Any]) -> Iterator[None]:
    """Within: these layers are as before adaption. For forwards without gradients.

    peft's ``disable_adapter`` also turns gradients of every adapter off and on again, module by module: as much Python
    as a whole forward of a small model.
    """
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _is_plain(layer: Any) -> bool:
    names = list(layer.lora_A)
    return (
        len(names) == 1
        and list(layer.active_adapters) == names
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and layer.lora_A[names[0]].bias is None
        and layer.lora_B[names[0]].bias is None
    )
