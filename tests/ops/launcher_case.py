"""A kernel launched twice by Triton's own launcher, over a driver that notes what it is given. Run by itself, without
Triton's interpreter: ``python launcher_case.py FOLDER``, where FOLDER has ``libcuda.so.1``."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from lizard_ops.tiles import launcher, plans, replay
from lizard_ops.tiles.places import Stream
from lizard_ops.tiles.strided import strided

NAMES = (
    "cuInit cuCtxGetCurrent cuCtxGetDevice cuCtxSetCurrent cuCtxGetLimit cuCtxSetLimit cuDeviceGet cuDriverGetVersion "
    "cuDevicePrimaryCtxRetain cuFuncSetAttribute cuFuncSetCacheConfig cuGetErrorString cuModuleUnload "
    "cuOccupancyMaxActiveClusters cuPointerGetAttributes cuStreamIsCapturing cuTensorMapEncodeTiled"
).split()
SOURCE = (
    "\n".join(f"int {name}() {{ return 0; }}" for name in NAMES)
    + """
#include <stdint.h>
int numbers = 0; uint64_t noted[64]; static uintptr_t next = 4096;
int cuDeviceGetAttribute(int *p, int a, int d) { *p = 232448; return 0; }
int cuFuncGetAttribute(int *p, int a, void *f) { *p = a == 0 ? 1024 : 0; return 0; }
int cuModuleLoadData(void **m, const void *image) { *m = (void *)(next += 16); return 0; }
int cuModuleGetFunction(void **f, void *m, const char *name) { *f = (void *)(next += 16); return 0; }
int cuPointerGetAttribute(void *found, int a, uint64_t p) { *(uint64_t *)found = p; return 0; }
int cuLaunchKernelEx(const uint32_t *config, void *f, void **values, void **extra) {
    noted[0] = (uint64_t)f;
    for (int i = 0; i < 7; i++) noted[1 + i] = config[i];
    for (int i = 0; i < numbers; i++) noted[8 + i] = *(uint32_t *)values[i];
    return 0;
}
"""
)


@triton.jit
def kernel(x, heads, rows, scale, nothing, stream, one, first, D: tl.constexpr, LONG: tl.constexpr):
    i = tl.arange(0, D)
    n = stream.length + stream.prefix + rows + one + first
    if stream.lengths is not None:
        n += tl.load(stream.lengths)
    y = tl.load(heads.ptr + i * heads.time + heads.head + heads.batch) * scale
    if nothing is None and LONG == "long":
        tl.store(x + i, y, mask=i < n)


NUMBERS = 13  # addresses, steps and counts; a 1, None and constants are compiled in


class Given(NamedTuple):
    x: torch.Tensor
    heads: torch.Tensor


def install(folder: str) -> ctypes.CDLL:
    """Make Triton launch for an H200 that is not there."""
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    library = ctypes.CDLL(f"{folder}/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    active = nvidia.CudaDriver.__new__(nvidia.CudaDriver)
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: 0
    active.get_device_capability = lambda device=0: (9, 0)
    active.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    active.launcher_cls = nvidia.CudaLauncher
    driver.set_active(active)
    active.utils = nvidia.CudaUtils()
    return library


def main() -> None:
    library = install(sys.argv[1])
    noted = (ctypes.c_uint64 * 64).in_dll(library, "noted")

    def arguments(size: int, deeper: bool) -> tuple[tuple, dict]:
        lengths = torch.ones(size, dtype=torch.int32) if deeper else None
        stream = Stream(None, lengths, None, ends=2, length=size, prefix=4, shift=0, start=4)
        args = (torch.ones(16), strided(torch.ones(1, size, 2, 16)), size, 0.3, None, stream, 1)
        return args, {"first": 7, "D": 16, "LONG": "long"}

    for size in (5, 48):
        for deeper in (False, True):
            plan, of_op = plans.Plan(), plans.Plan()
            ctypes.c_int.in_dll(library, "numbers").value = NUMBERS + deeper
            for _ in range(4):
                args, named = arguments(size, deeper)
                tensors = (args[0], args[1].ptr, args[5].lengths)
                noted[:] = [0] * 64
                kernel[(3,)](*args, **named)
                wanted = list(noted)
                assert wanted[1:4] == [3, 1, 1] and args[0].data_ptr() & 0xFFFFFFFF in wanted, wanted
                noted[:] = [0] * 64
                launcher.launch_kernel(kernel, 3, *args, **named)
                assert list(noted) == wanted, (size, list(noted), wanted)
                noted[:] = [0] * 64
                plans.launch_planned(plan, "one", kernel, tensors, lambda given=(3, args, named): given)
                assert list(noted) == wanted, (size, list(noted), wanted)

                def op(given, plan=of_op, tensors=tensors, args=args, named=named):
                    plans.launch_planned(plan, "one", kernel, tensors, lambda: (3, args, named))
                    return given.x

                noted[:] = [0] * 64
                replay.replayed(of_op, Given(args[0], args[1].ptr), op)
                assert list(noted) == wanted, (size, list(noted), wanted)
            assert (type(of_op.replay) is replay.Replay) != deeper
            assert (plan["one"] is plans.UNBOUND) == deeper
    assert len(launcher._known) == 4, launcher._known
    at_once = [found.run is found.compiled.run.launch for found, _ in launcher._known.values()]
    assert all(at_once), "Triton's launcher has gone before its function in C"
    print("the same")


if __name__ == "__main__":
    main()
