"""Which implementation runs."""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

from lizard_ops.common.checks import check_choice, refuse

IMPLS = ("auto", "triton", "torch", "naive")


def choose_impl(impl: str, q: Tensor, beyond_triton: str | None) -> str:
    """Resolve ``impl``. "auto" is "triton" for CUDA tensors unless they are beyond it, and "torch" elsewhere.

    beyond_triton: what these arguments ask for that the Triton kernels do not do, or None. "triton" on a CPU is for
    Triton's interpreter alone (TRITON_INTERPRET=1). Nothing that was asked for by name is replaced.
    """
    check_choice("impl", impl, IMPLS)
    on_gpu = q.device.type == "cuda"
    if impl == "auto":
        return "triton" if on_gpu and beyond_triton is None else "torch"
    if impl == "triton":
        if beyond_triton is not None:
            refuse("impl", impl, f'"torch" or "auto" for {beyond_triton}')
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            refuse("impl", impl, f'"torch" or "auto" for tensors on {q.device} (TRITON_INTERPRET=1 is not set)')
    return impl


def float64_of(q: Tensor) -> str | None:
    """Double precision is beyond the Triton kernels."""
    return "float64 tensors" if q.dtype == torch.float64 else None


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of x current: Triton launches on the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
