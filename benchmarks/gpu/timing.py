"""The time of a call on the GPU."""

from __future__ import annotations

from collections.abc import Callable

from triton.testing import do_bench, do_bench_cudagraph


def median_ms(call: Callable[[], object], milliseconds: int, graph: bool = False) -> float:
    """Median milliseconds of a call, over about ``milliseconds``.

    graph: of replays of a CUDA graph of it, so that a host too slow to keep the GPU busy does not count. A call that
    waits for the GPU cannot be captured and raises RuntimeError.
    """
    if graph:
        return do_bench_cudagraph(call, rep=milliseconds, return_mode="median")
    return do_bench(call, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")
