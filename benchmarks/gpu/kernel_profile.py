"""Time of each kernel in forward and backward of one row of kernel_times.py, on the GPU at hand.

python benchmarks/gpu/kernel_profile.py "lizard merge, outside" [--length 2048]
"""

from __future__ import annotations

import argparse

import torch
from rows import ROWS
from shapes import make_layer
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[row.name for row in ROWS], help="row of kernel_times.py")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    row = next(row for row in ROWS if row.name == options.row)
    x = make_layer(options.length)
    inputs = [t for t in vars(x).values() if t.requires_grad]

    def train() -> None:
        torch.autograd.grad(row.run(x), inputs, x.grad, allow_unused=True)

    for _ in range(3):
        train()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(options.runs):
            train()
        torch.cuda.synchronize()
    kernels = [e for e in seen.key_averages() if e.device_time_total > 0]
    kernels.sort(key=lambda e: -e.device_time_total)
    print(f"{row.name}: {sum(e.device_time_total for e in kernels) / options.runs:.0f} us a run")
    for e in kernels:
        print(f"{e.device_time_total / options.runs:8.0f} us x{e.count // options.runs} {e.key[:70]}")


if __name__ == "__main__":
    main()
