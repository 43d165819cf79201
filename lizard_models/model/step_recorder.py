"""How a step becomes a CUDA graph, and what in it could not be captured."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lizard_models.model.graphs import accompanied

Step = Callable[[], Tensor]
Replay = Callable[[], Tensor]
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

_one_at_a_time = (
    threading.Lock()
)  # PyTorch captures one graph at a time, and what else the stream is given would be in it
_streams: dict[torch.device, Any] = {}  # one a device: cuBLAS keeps a workspace for every stream that it has seen


class Recorder(Protocol):
    """What runs and captures steps."""

    def warm_up(self, step: Step) -> tuple[Tensor, str | None]:
        """What the step returns, run as it is, and why it cannot be captured, or None."""

    def capture(self, step: Step, pool: Any = None) -> Replay:
        """A function that runs what the step does, without its Python, and returns what it returned.

        pool: of ``new_pool``, memory that it shares with others of which one runs at a time; None is memory of its own.
        """

    def new_pool(self) -> Any:
        """Memory for several captures."""


class Uncapturable(TorchDispatchMode):
    """Looks for what a CUDA graph cannot hold, or would not repeat: waiting for the device, and random numbers."""

    found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        draws = torch.Tag.nondeterministic_seeded in func.tags
        if func in COPIES:
            devices = {x.device for x in (*args, out) if isinstance(x, Tensor)}
            reads = len(devices) > 1
        if self.found is None and (reads or draws):
            self.found = f"{func} {'waits for the device' if reads else 'draws random numbers'}"
        return out


class CudaRecorder:
    """Captures on a stream of its own, as PyTorch wants it, in memory of the graph's own."""

    def __init__(self, device: torch.device) -> None:
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        self.device, self.stream = device, _streams[device]

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.set_stream(current)
            current.wait_stream(self.stream)

    def warm_up(self, step: Step) -> tuple[Tensor, str | None]:
        with _one_at_a_time, self._on_stream(), Uncapturable() as looking:
            out = step()
        out.record_stream(torch.cuda.current_stream(self.device))
        return out, looking.found

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, step: Step, pool: Any = None) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with _one_at_a_time, self._on_stream(), _without_collection(), accompanied():
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                out = step()
            finally:
                graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """What the collector finds may free memory of another graph, which a capture forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def recorder_for(device: torch.device) -> Recorder | None:
    """What captures steps on a device; None where there are no graphs."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.is_current_stream_capturing():
        return None
    return CudaRecorder(device)
