"""The delta memory on a GPU: against float64 on the CPU, without a synchronisation, in a CUDA graph, and its time.

    python benchmarks/gpu/delta_memory.py

Forward and backward of ``chunk_hybrid_attn`` with beta at the shape of a SmolLM2-135M layer, bf16. Prints the largest
error beside that of the sums, whether a captured graph gives the same numbers, and ms a forward and backward for the
sums (one fused kernel) and the delta memory at several sizes. Under a minute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops import chunk_hybrid_attn

HEADS, KEY_HEADS, DIM, COLUMNS, WINDOW = 9, 3, 64, 128, 128
OPTIONS = dict(anchors=4, mix="merge", coverage="outside", feature_map="softmax")
SIZES = ((4, 1024), (8, 2048), (1, 8192))


def inputs(rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, fq, fk, g and beta, random."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(HEADS, DIM), (KEY_HEADS, DIM), (KEY_HEADS, DIM), (HEADS, COLUMNS), (KEY_HEADS, COLUMNS)]
    heads = [torch.randn(rows, length, *shape, generator=draw).to("cuda", dtype) for shape in shapes]
    gate, beta = (torch.randn(rows, length, KEY_HEADS, generator=draw).cuda() for _ in range(2))
    return [*heads, torch.nn.functional.logsigmoid(gate + 5), beta.sigmoid()]


def both(x: list[Tensor], delta: bool) -> list[Tensor]:
    """Output and gradients."""
    used = x if delta else x[:6]
    o, _ = chunk_hybrid_attn(*x[:6], WINDOW, beta=x[6] if delta else None, **OPTIONS)
    return [o.detach(), *torch.autograd.grad(o.float().square().mean() * 1000, used)]


def error(x: list[Tensor], delta: bool) -> list[float]:
    """Largest errors of output and gradients over the largest value of each."""
    exact = both([t.detach().double().cpu().requires_grad_() for t in x], delta)
    return [
        ((a.double().cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(both(x, delta), exact, strict=True)
    ]


def captured(x: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of forward and backward with the delta memory, and where its results stand."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            both([t.detach().requires_grad_() for t in x], True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both([t.detach().requires_grad_() for t in x], True)
    return graph, results


def milliseconds(run) -> float:
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(10):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 10


def main() -> None:
    """Prints the page."""
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for dtype in (torch.float32, torch.bfloat16):
        x = [t.requires_grad_() for t in inputs(1, 700, dtype)]
        for delta in (False, True):
            print(str(dtype), "delta" if delta else "sum", " ".join(f"{e:.1e}" for e in error(x, delta)))
    x = [t.requires_grad_() for t in inputs(4, 1024, torch.bfloat16)]
    both(x, True)
    torch.cuda.set_sync_debug_mode("error")
    plain = both(x, True)
    torch.cuda.set_sync_debug_mode("default")
    graph, results = captured(x)
    graph.replay()
    same = all(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-4) for a, b in zip(plain, results, strict=True))
    print("no synchronisation; the captured graph gives", "the same numbers" if same else "OTHER NUMBERS")
    for rows, length in SIZES:
        x = [t.requires_grad_() for t in inputs(rows, length, torch.bfloat16)]
        graph, _ = captured(x)
        times = [milliseconds(lambda x=x, delta=delta: both(x, delta)) for delta in (False, True)]
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"{rows} x {length}: sum {times[0]:.2f} ms, delta {times[1]:.2f} ms, delta in a graph "
            f"{milliseconds(graph.replay):.2f} ms, peak {peak:.1f} GiB"
        )
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
