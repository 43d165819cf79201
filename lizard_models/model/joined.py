"""Projections of one input as one product: their weights lie side by side in one memory, and stay what they are.

A parameter is a view of that memory, so that what changes it in place is in the product too. One that has been replaced
or moved lies elsewhere, which every call looks for: the projections are then computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lizard_models.model.hooks import is_hooked, linear
from lizard_models.model.norms import running_norms


def wants_joined(weight: Tensor) -> bool:
    """Where a product costs a launch, or the threads of a CPU wait for one another after each."""
    return weight.is_cuda or weight.device.type == "cpu"


def join_projections(layers: Sequence[nn.Module]) -> None:
    """Lay the projections of one input in each of these decoder layers side by side.

    Which these are a part of a layer says in ``joins``. A group at a time is copied: that much memory more for a
    moment, none afterwards. The parameters are the same objects with other addresses, so this is for when a model is
    loaded, made or moved. ``torch.save`` writes the memory of a group once, a pickle without it once for each weight.
    """
    for layer in layers:
        vars(layer).pop("token_step", None)
        for part in (getattr(layer, "self_attn", None), getattr(layer, "mlp", None)):
            group = [getattr(part, name) for name in getattr(part, "joins", ())]
            if part is not None:
                vars(part).pop("joined", None)  # lets go of where they were
            if group and all(isinstance(module, nn.Linear) and not is_hooked(module) for module in group):
                lay_side_by_side(group)


def lay_side_by_side(group: Sequence[Any]) -> None:
    """Give the weights of these Linear modules, and their biases, one memory; nothing where they cannot share one."""
    for name in ("weight", "bias"):
        tensors = [getattr(module, name) for module in group]
        if all(may_move(t) for t in tensors) and alike(tensors) and adjacent(tensors) is None:
            with torch.inference_mode(False), torch.no_grad():
                whole = torch.cat(tensors)
                for t, part in zip(tensors, whole.split([len(t) for t in tensors]), strict=True):
                    t.data = part


def may_move(t: Tensor | None) -> bool:
    """Whether this parameter has a memory of its own that its address may leave."""
    if type(t) is not nn.Parameter or t.is_meta or not t.is_contiguous() or not wants_joined(t):
        return False
    return t.untyped_storage().nbytes() == t.nbytes and not t.is_inference() and t.numel() > 0


def alike(tensors: Sequence[Tensor]) -> bool:
    """Whether they differ in their rows alone."""
    return len({(t.dtype, t.device, t.shape[1:]) for t in tensors}) == 1 and len({id(t) for t in tensors}) == len(
        tensors
    )


def adjacent(tensors: Sequence[Any]) -> Tensor | None:
    """All of them as one tensor, where they lie side by side in one memory; None elsewhere."""
    first = tensors[0]
    if any(type(t) is not nn.Parameter or not t.is_contiguous() for t in tensors) or not alike(tensors):
        return None
    memory = first.untyped_storage().data_ptr()
    if any(t.untyped_storage().data_ptr() != memory for t in tensors[1:]):
        return None
    if any(a.data_ptr() + a.nbytes != b.data_ptr() for a, b in pairwise(tensors)):
        return None
    return first.detach().as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


class Joined:
    """The weights of a group as one, remembered by the addresses of its parts; copies and pickles begin without."""

    __slots__ = ("bias", "places", "rows", "weight")

    def __init__(self) -> None:
        self.places: list[int] = []
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.rows: list[int] = []

    def find(self, group: Sequence[nn.Linear]) -> bool:
        """Whether the weights lie side by side; they are then in ``weight`` and ``bias``.

        What is remembered keeps its memory alive, so that nothing else can have come to these addresses.
        """
        there = [p for m in group for p in m._parameters.values()]
        places = [0 if p is None else p.data_ptr() for p in there]
        if places != self.places or self.weight is None or self.weight.data_ptr() != places[0]:
            weights, biases = [m.weight for m in group], [m.bias for m in group]
            self.places, self.weight, self.bias = places, adjacent(weights), None
            self.rows = [w.shape[0] for w in weights]
            if self.weight is not None and any(b is not None for b in biases):
                self.bias = adjacent(biases)
                self.weight = None if self.bias is None else self.weight
        return self.weight is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return Joined, ()


def products(part: Any, x: Tensor, running: Any = None) -> Sequence[Tensor]:
    """What each of the projections that this part ``joins`` makes of x.

    As for ``running_norms`` views of one product, unless weights do not lie side by side, a gradient is recorded or
    somebody looks. running: what that says of x, where it has been asked.
    """
    group = [part._modules[name] for name in part.joins]
    if running is None and running_norms(x) is None:
        return [module(x) for module in group]
    for module in group:
        if type(module) is not nn.Linear or is_hooked(module) or (torch.is_grad_enabled() and is_recorded(module, x)):
            return [linear(other, x) for other in group]
    held: Joined = part.__dict__.setdefault("joined", Joined())
    if not held.find(group):
        return [linear(module, x) for module in group]
    return torch.split_with_sizes(F.linear(x, cast(Tensor, held.weight), held.bias), held.rows, -1)


def is_recorded(module: nn.Module, x: Tensor) -> bool:
    """Whether a product of x with this module's own parameters has a gradient."""
    return x.requires_grad or any(p is not None and p.requires_grad for p in module._parameters.values())
