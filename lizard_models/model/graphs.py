"""What runs once and is replayed: traces of torch.compile and CUDA graphs, of which Python sees no replay."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class SeenPositions:
    """How many positions a cache has seen, padding included.

    Python counts them until a step is traced by torch.compile or captured in a CUDA graph, of which Python sees no
    replay. From then on the tensor alone is right, and reading it waits for the device.
    """

    def __init__(self) -> None:
        self.on_host: int | None = 0
        self.on_device: Tensor | None = None

    def add(self, positions: int, device: torch.device | None = None) -> None:
        """Count so many more, from now on on this device too."""
        # The first forward that a cache goes through may be traced: torch.compile guards Python's count and repeats
        # what is done to it here, so both counts are right. Only one that stays for many replays counts alone.
        first = self.on_device is None and torch.compiler.is_compiling()
        if device is not None and self.on_device is None:
            self.live_on(device)
        if self.on_device is not None:
            self.on_device.add_(positions)
        if is_graphed(self.on_device) and not first:
            self.on_host = None
        elif self.on_host is not None:
            self.on_host += positions

    def live_on(self, device: torch.device) -> None:
        """Count on this device too."""
        if self.on_device is None:
            with outside_inference_mode():
                self.on_device = torch.tensor(self.on_host, device=device)
            mark_static(self.on_device)
        elif self.on_device.device != device:
            self.on_device = self.on_device.to(device)

    def value(self) -> int:
        """The count."""
        if self.on_host is not None:
            return self.on_host
        assert self.on_device is not None
        return int(self.on_device)

    def value_in_graph(self) -> Tensor | int:
        """The count, which a graph reads anew whenever it runs: int64 [] once the device counts."""
        if self.on_device is not None:
            return self.on_device
        assert self.on_host is not None
        return self.on_host

    def reset(self) -> None:
        """Back to 0, still on the device alone if it was."""
        if self.on_device is not None:
            self.on_device.zero_()
        if self.on_host is not None:
            self.on_host = 0

    def copy(self) -> SeenPositions:
        """An independent one."""
        new = SeenPositions()
        new.on_host, new.on_device = self.on_host, None if self.on_device is None else self.on_device.clone()
        return new


_accompanied: contextvars.ContextVar[bool] = contextvars.ContextVar("lizard_accompanied", default=False)


@contextlib.contextmanager
def accompanied() -> Iterator[None]:
    """Within: what is captured will be replayed by one who counts positions along in Python, and knows the new tokens
    for real ones, so it is captured as it would run."""
    token = _accompanied.set(True)
    try:
        yield
    finally:
        _accompanied.reset(token)


def is_accompanied() -> bool:
    """Whether what runs now is, or is like, what is captured for such a one, who has looked at masks and positions."""
    return _accompanied.get()


def is_graphed(like: Tensor | None) -> bool:
    """Whether what runs now is traced by torch.compile or captured in a CUDA graph, to be replayed without Python."""
    if torch.compiler.is_compiling():
        return True
    return like is not None and like.is_cuda and not _accompanied.get() and torch.cuda.is_current_stream_capturing()


def is_exporting() -> bool:
    """Whether torch.export traces, which may leave the length open."""
    return torch.compiler.is_exporting()


@torch._dynamo.assume_constant_result
def _one_graph() -> bool:
    """Asked while torch.compile traces: whether it was told to make one graph of everything (fullgraph, export)."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        root: Any = InstructionTranslator.current_tx().output.root_tx
        return bool(root.one_graph or root.error_on_graph_break)
    except (ImportError, AttributeError):  # it is of torch's inside; the careful answer is right everywhere
        return True


def may_leave_graph() -> bool:
    """Whether code marked with ``torch.compiler.disable`` runs: not in an export, nor under fullgraph=True."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not _one_graph()


def outside_inference_mode() -> contextlib.AbstractContextManager:
    """A context whose new tensors may be written to anywhere."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def mark_static(t: Tensor | None) -> None:
    """Tell torch.compile that the address of t stays, so that its CUDA graphs write to it."""
    if t is not None and not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(t, guard=False)
