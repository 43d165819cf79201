"""The families' norms in one kernel where a student reads without gradients; their own formula everywhere else."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lizard_ops import rms_norm

UNIT_OFFSET = {
    "LlamaRMSNorm": False, "MistralRMSNorm": False, "Qwen2RMSNorm": False, "Qwen3RMSNorm": False,
    "SmolLM3RMSNorm": False, "Gemma2RMSNorm": True, "Gemma3RMSNorm": True,
}  # fmt: skip
_fused: contextvars.ContextVar[bool] = contextvars.ContextVar("lizard_fused_norms", default=False)


@contextlib.contextmanager
def fused_norms() -> Iterator[None]:
    """Within: norms that are ``with_kernel`` take it on CUDA tensors. Not for what torch.compile traces."""
    token = _fused.set(True)
    try:
        yield
    finally:
        _fused.reset(token)


def on_gpu(x: Tensor) -> bool:
    """Where there are kernels."""
    return x.is_cuda


class KernelNorm:
    """Mixed into a family's norm by ``with_kernel``."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """As the family's, within ``fused_norms`` in one kernel."""
        family: Any = super()
        if torch.compiler.is_compiling() or not _fused.get() or not on_gpu(x):
            return family.forward(x)
        unit_offset = UNIT_OFFSET[type(self).__name__]
        floats = x.dtype != torch.float64 and (unit_offset or self.weight.dtype == x.dtype)
        if not floats or torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return family.forward(x)
        eps = getattr(self, "variance_epsilon", None) or self.eps  # type: ignore[attr-defined]
        return rms_norm(x, self.weight, eps, unit_offset=unit_offset)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the class is made at run time, so a copy is made from the family's."""
        return _blank, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _kernel_class(family: Any) -> type:
    return type(family.__name__, (KernelNorm, family), {})


def _blank(family: Any) -> Any:
    norm: Any = _kernel_class(family)
    return norm.__new__(norm)


def with_kernel(module: nn.Module) -> nn.Module:
    """A twin of a family's norm, with the same parameters, that can take the kernel; other modules as they are.

    Its class keeps its name. The module itself stays what it was: a teacher may go on with it.
    """
    family: Any = type(module)
    if family.__name__ not in UNIT_OFFSET or not family.__module__.startswith("transformers."):
        return module
    twin = _blank(family)
    twin.__dict__ = module.__dict__ | {"_parameters": dict(module._parameters)}
    return twin
