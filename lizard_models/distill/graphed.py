"""Forward and backward of a training objective as one CUDA graph: a step of a small model is bound by its launches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lizard_models.model.once import once

WARM_UP = 3  # passes before the capture: kernels compile, libraries allocate


@dataclass
class _Captured:
    graph: Any
    input_ids: Tensor
    loss: Tensor
    gradients: list[Tensor]


class GraphedForward:
    """The forward of ``objective``, replayed from a CUDA graph that holds its backward too.

    The first call with a shape of input_ids runs the objective a few times, captures loss and gradients of all its
    trained parameters, and keeps the memory they took. Later calls copy the tokens in and launch one graph; the loss
    they return hands out the gradients that came with it. Losses and gradients are those of the objective itself.

    Calls without gradients, with an attention mask or on a CPU go to the objective. Parameters must be changed in
    place, as optimizers and checkpoints do. Nothing in the objective may wait for the device or draw random numbers.
    """

    def __init__(self, objective: nn.Module) -> None:
        self.objective = objective
        self.plain = objective.forward
        self.captured: dict[torch.Size, _Captured] = {}
        self.capturing = False

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        aside = attention_mask is not None or not input_ids.is_cuda or not torch.is_grad_enabled()
        if self.capturing or aside:
            return self.plain(input_ids, attention_mask)
        parameters = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        captured = self.captured.get(input_ids.shape)
        if captured is None:
            captured = self.captured[input_ids.shape] = self._capture(input_ids, parameters)
        captured.input_ids.copy_(input_ids)
        captured.graph.replay()
        return {"loss": _HandOut.apply(captured.loss, captured.gradients, *parameters.values())}

    def _capture(self, input_ids: Tensor, parameters: dict[str, nn.Parameter]) -> _Captured:
        held = input_ids.clone()

        def both() -> tuple[Tensor, list[Tensor]]:
            # New leaves around the same values: the old ones' gradient nodes belong to the stream of their first use.
            leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            loss = torch.func.functional_call(self.objective, leaves, (held,))["loss"]
            return loss.detach(), list(torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True))

        stream = torch.cuda.Stream(held.device)
        graph = torch.cuda.CUDAGraph()
        self.capturing = True
        try:
            stream.wait_stream(torch.cuda.current_stream(held.device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    both()
            torch.cuda.current_stream(held.device).wait_stream(stream)
            with torch.cuda.graph(graph):
                loss, gradients = both()
        finally:
            self.capturing = False
        return _Captured(graph, held, loss, gradients)


class _HandOut(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            gradients = torch._foreach_mul(ctx.gradients, grad)
        instead = "a replayed graph leaves none to differentiate: call the objective outside of graphed()"
        return once("a loss from a CUDA graph", instead, (None, None, *gradients), (grad, *ctx.saved_tensors))


@contextlib.contextmanager
def graphed(objective: nn.Module, enabled: bool = True) -> Iterator[nn.Module]:
    """Within: ``objective``'s forward is a ``GraphedForward``, its names and parameters unchanged."""
    if not enabled:
        yield objective
        return
    objective.forward = GraphedForward(objective)  # type: ignore[method-assign]
    try:
        yield objective
    finally:
        del objective.forward
