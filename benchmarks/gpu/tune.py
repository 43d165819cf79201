"""Tune the launch configurations of the ops for a shape on the GPU at hand, and store them.

    python benchmarks/gpu/tune.py                                   # the shape of kernel_times.py, T = 2048
    python benchmarks/gpu/tune.py --head-dim 64 --heads 9 --key-heads 3 --length 4096 --out launches.json

Prints what was found, with the time of the whole call (forward and backward) before and after. A program uses the
file with ``lizard_ops.use_tuned(path)``; without --out it is ~/.cache/lizard-attn/launches.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from shape_times import RUNS, inputs_of

import lizard_ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write or add to")
    parser.add_argument("--ops", default="gated key,window,hybrid", help="of " + ", ".join(RUNS))
    parser.add_argument("--tokens", type=int, default=32768, help="batch times length")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args()
    x = inputs_of(options.length, options.heads, options.key_heads, options.head_dim, options.tokens)
    for op in options.ops.split(","):
        run = RUNS[op]

        def call(run=run):
            o, leaves = run(x)
            return o, torch.autograd.grad(o, leaves, x.grad, allow_unused=True)

        start = time.perf_counter()
        found = lizard_ops.tune(call, options.out)
        print(f"{op}: {len(found)} of its kernels gained, {time.perf_counter() - start:.0f} s")
        for key, choice in found.items():
            print(f"  {choice.before:.3f} -> {choice.after:.3f} ms  {choice.fields}  {key[:90]}")


if __name__ == "__main__":
    main()
