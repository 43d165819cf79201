"""What all ranks sent, on every rank, and its gradient on the way back: one collective each."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lizard_ops.common.checks import want
from lizard_ops.context_parallel.part import Sent

Result = TypeVar("Result")
ALIGNED = 16  # bytes; a tensor of any dtype may begin at a multiple


def over_ranks(asking: Generator[Sent, Sent, Result], group: Any) -> Result:
    """What ``asking`` returns once it has been given what all ranks of the group sent, as often as it asks."""
    try:
        sent = next(asking)
        while True:
            sent = asking.send(gathered(sent, group))
    except StopIteration as done:
        return done.value


def process_group(name: str, group: Any) -> Any:
    """The ProcessGroup of this argument, which may be a DeviceMesh of one dimension."""
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    wanted = "a torch.distributed ProcessGroup of which this rank is one, or a DeviceMesh of one dimension"
    if isinstance(group, DeviceMesh):
        want(group.ndim == 1, name, group, wanted)
        return group.get_group()
    want(isinstance(group, ProcessGroup) and group.rank() >= 0, name, group, wanted)
    return group


def gathered(sent: Sent, group: Any) -> Sent:
    """Every tensor [...] as [R, ...], in the order of the ranks."""
    found = _Gather.apply(group, *(x.contiguous() for x in sent.values()))
    return dict(zip(sent, found, strict=True))


class _Gather(torch.autograd.Function):
    """All tensors in one message of bytes; their gradients summed over ranks in one of the widest dtype."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.shapes = group, [(x.shape, x.dtype) for x in tensors]
        ctx.set_materialize_grads(False)
        sizes = [-(-x.numel() * x.element_size() // ALIGNED) * ALIGNED for x in tensors]
        message = tensors[0].new_zeros(sum(sizes), dtype=torch.uint8)
        for x, place in zip(tensors, message.split(sizes), strict=True):
            place[: x.numel() * x.element_size()].copy_(x.flatten().view(torch.uint8))
        ranks = group.size()
        every = message.new_empty(ranks, message.numel())
        _collective("all_gather_single", "all_gather_into_tensor")(every.view(-1), message, group=group)
        parts = []
        for x, place in zip(tensors, every.split(sizes, 1), strict=True):
            own = place[:, : x.numel() * x.element_size()].contiguous()
            parts.append(own.view(x.dtype).view(ranks, *x.shape))
        ctx.mark_non_differentiable(*(x for x, need in zip(parts, ctx.needs_input_grad[1:], strict=True) if not need))
        return tuple(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks, wanted = ctx.group.size(), [n for n, need in enumerate(ctx.needs_input_grad[1:]) if need]
        dtype = max((ctx.shapes[n][1] for n in wanted), key=lambda kind: torch.finfo(kind).bits)
        dtype = dtype if dtype == torch.float64 else torch.float32
        device = next(x.device for x in grads if x is not None)
        sizes = [ctx.shapes[n][0].numel() for n in wanted]
        message = torch.zeros(ranks, sum(sizes), dtype=dtype, device=device)
        for n, place in zip(wanted, message.split(sizes, 1), strict=True):
            grad = grads[n]
            if grad is not None:
                place.copy_(grad.reshape(ranks, -1))
        own = message.new_empty(message.shape[1])
        _collective("reduce_scatter_single", "reduce_scatter_tensor")(own, message.view(-1), group=ctx.group)
        found: list[Tensor | None] = [None] * len(ctx.shapes)
        for n, place in zip(wanted, own.split(sizes), strict=True):
            shape, kind = ctx.shapes[n]
            found[n] = place.view(shape).to(kind)
        return None, *found


def _collective(name: str, old: str) -> Any:
    """The function of torch.distributed of this name, or of the one that it had before torch 2.13."""
    from torch import distributed

    return getattr(distributed, name, None) or getattr(distributed, old)
