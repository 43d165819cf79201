"""LoRA in a half-precision model: products in the model's dtype, parameters and their gradients in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lizard_models.model.hooks import is_hooked


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    *,
    saved_first: bool = False,
) -> Tensor:
    """x weight^T + bias + scaling (x down^T) up^T, with products in the dtype of x and sums in float32.

    x [..., I], weight [O, I] and bias [O] of one dtype, the latter two frozen; down [R, I] and up [O, R] float32,
    rounded to that dtype for the products, as under autocast. Result [..., O] and gradient of x have their dtype, the
    gradients of down and up are float32. The update is added where the product with the weight lies, in both
    directions, with no copy of either. Differentiable any number of times. saved_first: what the gradient reads is
    saved before the product with the weight is made, by a node of autograd of its own, so that a layer that is run
    again in the backward and ends here does not make that product again (PyTorch's checkpoint stops at the last tensor
    that it is to find). The same bits.

    Raises ValueError for a weight or bias that trains.
    """
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.requires_grad:
            raise ValueError(f"{name}: got one that trains, wanted it frozen: its gradient is not computed")
    if saved_first:
        place, inner, b = _Saved.apply(x, weight, down, up, scaling)
        return _Product.apply(place, x.detach(), weight, bias, inner, b, scaling)
    return _AdaptedLinear.apply(x, weight, bias, down, up, scaling)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, inner: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Of rows [N, I], their product with down, [N, R], and up [O, R] in their dtype: [N, O]."""
    return F.linear(rows, weight, bias).addmm_(inner, b.mT, alpha=scaling)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows, a, b = x.flatten(0, -2), down.to(x.dtype), up.to(x.dtype)
        inner = rows @ a.mT  # [N, R]
        y = _product(rows, weight, bias, inner, b, scaling)
        ctx.save_for_backward(rows, inner, a, b, x, weight, down, up)  # the last four are there anyway
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_down, of_up = _gradients(ctx, grad)
        return of_x, None, None, of_down, of_up, None


class _Saved(torch.autograd.Function):
    """What the gradient of an adapted linear layer reads, and a place [..., O] without memory that it comes back to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> tuple[Tensor, ...]:
        rows, a, b = x.flatten(0, -2), down.to(x.dtype), up.to(x.dtype)
        inner = rows @ a.mT
        ctx.save_for_backward(rows, inner, a, b, x, weight, down, up)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(inner, b)
        ctx.set_materialize_grads(False)
        return x.new_empty(()).expand(*x.shape[:-1], len(weight)), inner, b

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        of_x, of_down, of_up = _gradients(ctx, grad)
        return of_x, None, of_down, of_up, None


class _Product(torch.autograd.Function):
    """The output in that place, whose gradient is the place's."""

    @staticmethod
    def forward(
        ctx: Any,
        place: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inner: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        return _product(x.flatten(0, -2), weight, bias, inner, b, scaling).view(place.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * 6


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of x, down and up, by that of the output and what a node has saved."""
    rows, inner, a, b, x, weight, down, up = ctx.saved_tensors
    again = torch.is_grad_enabled()
    if again:  # the same, as functions of the inputs
        rows, a, b = x.flatten(0, -2), down.to(x.dtype), up.to(x.dtype)
        inner = rows @ a.mT
    of_y = grad.flatten(0, -2)
    of_inner = ctx.scaling * (of_y @ b)
    of_x = None
    if ctx.needs_input_grad[0]:
        of_x = of_y @ weight
        of_x = (of_x.addmm(of_inner, a) if again else of_x.addmm_(of_inner, a)).view(x.shape)
    return of_x, _sum_of_products(of_inner, rows), ctx.scaling * _sum_of_products(of_y, inner)


def _sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """left^T right over the tokens, not rounded to half precision where the device can leave it."""
    exact = left.is_cuda and left.dtype in (torch.bfloat16, torch.float16)
    if exact and not torch.is_grad_enabled():  # a product of another dtype has no derivative
        return torch.mm(left.mT, right, out_dtype=torch.float32)
    return (left.mT @ right).to(torch.promote_types(left.dtype, torch.float32))


class HalfPrecisionLora(Linear):
    """peft's LoRA of a linear layer as one ``adapted_linear``.

    peft casts the input to float32, multiplies there and casts the sum back: more memory, and slower units of a GPU.
    Under autocast, or where somebody looks at the layer inside, its forward is peft's. ends: the decoder layer that
    ends with it, in a tuple, so that it is no part of it.
    """

    ends: tuple[nn.Module, ...] = ()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        seen = is_hooked(base) or torch.is_autocast_enabled(x.device.type)
        if self.disable_adapters or self.merged or args or kwargs or seen:
            return super().forward(x, *args, **kwargs)
        (name,) = self.lora_A
        down: Any = self.lora_A[name].weight
        up: Any = self.lora_B[name].weight
        again = self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.ends)
        return adapted_linear(x, base.weight, base.bias, down, up, self.scaling[name], saved_first=again)


def fuse_adapters(model: nn.Module) -> None:
    """Makes every plain LoRA layer of ``model`` a ``HalfPrecisionLora``, in place.

    A layer with dropout, biases, a variant of LoRA, several adapters or a base that trains keeps peft's forward.
    """
    for layer in model.modules():
        if type(layer) is Linear and _is_plain(layer):
            layer.__class__ = HalfPrecisionLora  # its parameters and their names stay
    for layer in model.modules():
        last = getattr(getattr(layer, "mlp", None), "down_proj", None)
        if isinstance(last, HalfPrecisionLora):
            last.ends = (layer,)


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
        and type(layer.base_layer) is nn.Linear
        and not any(p.requires_grad for p in layer.base_layer.parameters())
    )
