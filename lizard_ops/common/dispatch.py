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


class TooLarge(ValueError):
    """Sizes whose kernel takes more shared memory than the GPU has."""


class on_device:  # noqa: N801  # reads as the context that it is
    """Make the device of x current, on which Triton launches, and say which sizes do not fit on it.

    sizes: what decides how large the tiles are, by the names that a caller knows.
    """

    __slots__ = ("device", "sizes", "x")

    def __init__(self, x: Tensor, **sizes: int):
        self.x, self.sizes = x, sizes
        self.device: contextlib.AbstractContextManager[object] | None = None
        if x.is_cuda and x.device.index != torch._C._cuda_getDevice():  # CUDA is up where there is such a tensor
            self.device = torch.cuda.device(x.device)

    def __enter__(self) -> None:
        if self.device is not None:
            self.device.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.device is not None:
            self.device.__exit__(kind, error, trace)  # type: ignore[arg-type]
        if kind is not None and kind.__name__ == "OutOfResources":  # by name: Triton need not be there
            got = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
            limit, what, needed = (getattr(error, name, "?") for name in ("limit", "name", "required"))
            where = f"wanted sizes whose tiles fit the {limit} bytes of {what} on {self.x.device}, not {needed}"
            raise TooLarge(f"{', '.join(self.sizes) or 'x'}: got {got} in {self.x.dtype}, {where}") from error
