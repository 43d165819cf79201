"""What an op calls of PyTorch between its launches, noted so that it can be called again without the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

UNIT = 512  # bytes: as far apart as PyTorch's allocator has tensors on a GPU, at least
ALLOCATIONS = {torch.empty, torch.empty_like, Tensor.new_empty}
# What is true of every call of a kind: tensors of the same shapes, strides, dtypes and devices.
QUESTIONS = {
    Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__, Tensor.is_cuda.__get__,
    Tensor.stride, Tensor.numel, Tensor.get_device, Tensor.is_contiguous, Tensor.data_ptr, Tensor.size, Tensor.dim,
    Tensor.__len__,
}  # fmt: skip
# Nothing but their arguments decides what these return, a tensor or several, and they change none.
OPERATORS = {
    Tensor.neg, Tensor.sub, Tensor.div, Tensor.gt, Tensor.log2, Tensor.sum, Tensor.to, Tensor.float, Tensor.contiguous,
    Tensor.transpose, Tensor.view, Tensor.reshape, Tensor.unflatten, Tensor.mT.__get__, Tensor.__getitem__,
    Tensor.matmul, Tensor.new_zeros, torch.mm, torch.where, torch.zeros_like, torch.split_with_sizes,
}  # fmt: skip


class Call(NamedTuple):
    """A call of an operator."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    named: dict[str, Any]
    results: tuple[Tensor, ...]

    @property
    def first(self) -> Tensor | None:
        """The tensor that this is called on, where all it does is to look at it from its beginning in another way."""
        x, y = self.args[0] if self.args else None, self.results[0]
        if not isinstance(x, Tensor) or len(self.results) > 1 or x.data_ptr() != y.data_ptr() or not y.numel():
            return None
        return x if x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() else None


class Calls(TorchFunctionMode):
    """Notes the calls of operators made inside. made: tensors that are allocated, which live as long as this does;
    others: calls that may do anything else."""

    def __init__(self, noted: list[Any]) -> None:
        super().__init__()
        self.noted, self.made, self.others = noted, [], 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.made.append(found)
        elif func in OPERATORS and not any(found is x for x in args):
            results = tuple(found) if isinstance(found, (tuple, list)) else (found,)
            self.noted.append(Call(func, args, kwargs or {}, results))
        elif func not in QUESTIONS and func not in OPERATORS:
            self.others += 1
        return found


def laid_out(lives: Sequence[tuple[int, int, int]]) -> tuple[tuple[int, ...], int]:
    """Where in one memory pieces of (bytes, first step, last step) lie, and its size: what lives at once is apart."""
    placed: list[tuple[int, int, int, int]] = []
    for size, first, last in lives:
        start, room = 0, -(-size // UNIT) * UNIT
        for other, end, since, until in sorted(placed):
            if since <= last and first <= until:
                if other - start >= room:
                    break
                start = max(start, end)
        placed.append((start, start + room, first, last))
    return tuple(start for start, *_ in placed), max((end for _, end, *_ in placed), default=0)
