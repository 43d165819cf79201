"""Time every kernel beside its peers on the GPU at hand and write the table with its environment.

    python benchmarks/gpu/kernel_times.py --out benchmarks/results/kernels/NAME.json [--peers fla] [--rows whole]

A row of ours is timed only after its output and every gradient passed a check against float64 on a short input;
a red row shows its error and no time. Medians of CUDA-event times; memory is the peak above the inputs. With --graph
each call is replayed from a CUDA graph, so that a host too slow to keep the GPU busy does not count, for peers alike.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from environment import environment
from rows import ROWS, Row
from shapes import LENGTHS, LayerInputs, make_layer
from timing import median_ms


def gradients(row: Row, x: LayerInputs) -> dict[str, torch.Tensor]:
    """The output and the gradient of each input the row reads."""
    for tensor in vars(x).values():
        tensor.grad = None
    o = row.run(x)
    o.backward(x.grad.to(o.dtype))
    found = {name: tensor.grad.double() for name, tensor in vars(x).items() if tensor.grad is not None}
    return {"o": o.detach().double()} | found


def worst_error(row: Row) -> tuple[str, float]:
    """Largest relative RMS error in bfloat16 against the same call on float64 copies (PyTorch path)."""
    x = make_layer(517, tokens=1034)
    exact = LayerInputs(*(t.detach().double().requires_grad_(t.requires_grad) for t in vars(x).values()))
    ours, reference = gradients(row, x), gradients(row, exact)
    errors = {name: ((ours[name] - r).norm() / r.norm().clamp_min(1e-30)).item() for name, r in reference.items()}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return worst, errors[worst]


def measure(row: Row, length: int, milliseconds: int, graph: bool) -> dict[str, float]:
    x = make_layer(length)
    inputs = [t for t in vars(x).values() if t.requires_grad]

    def forward():
        with torch.no_grad():
            row.run(x)

    def train():
        torch.autograd.grad(row.run(x), inputs, x.grad, allow_unused=True)

    start = time.perf_counter()
    train()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    forward_ms, training_ms = (median_ms(call, milliseconds, graph) for call in (forward, train))
    return {"forward_ms": forward_ms, "training_ms": training_ms, "first_call_s": first, "peak_GiB": peak / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rows", default="", help="only groups or names that contain this")
    parser.add_argument("--peers", default="fla,full", help="peers to time, by the start of their name; '' for none")
    parser.add_argument("--milliseconds", type=int, default=200, help="time spent on each median")
    parser.add_argument("--graph", action="store_true", help="time replays of a CUDA graph of each call")
    parser.add_argument("--tolerance", type=float, default=2e-2, help="relative RMS error that makes a row red")
    options = parser.parse_args()
    peers = tuple(name for name in options.peers.split(",") if name)
    lengths = LENGTHS
    results: dict = {"environment": environment(), "rows": []}
    for row in ROWS:
        ours = row.name.startswith("lizard")
        if options.rows not in f"{row.group} {row.name}" or not (ours or row.name.startswith(("put", *peers))):
            continue
        entry: dict = {"group": row.group, "name": row.name}
        entry |= {"goal_forward_ms": row.forward_goal, "goal_training_ms": row.training_goal}
        try:
            if ours:
                entry["worst"], entry["worst_error"] = worst_error(row)
                if not entry["worst_error"] < options.tolerance:
                    raise RuntimeError(f"{entry['worst']} is wrong by {entry['worst_error']:.3g}")
            for length in lengths:
                entry[str(length)] = measure(row, length, options.milliseconds, options.graph)
        except Exception as error:  # a peer or a row that fails must not hide the others
            entry["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150] if str(error) else ''}"
        results["rows"].append(entry)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()
    print_table(results, lengths)


def print_table(results: dict, lengths: tuple[int, ...]) -> None:
    print(results["environment"])
    print(f"{'':52s}" + "".join(f"{'T=' + str(n):>24s}" for n in lengths) + "   worst error  first s")
    print(f"{'forward / forward+backward ms / peak GiB':52s}")
    for entry in results["rows"]:
        times = [entry[str(n)] for n in lengths if str(n) in entry]
        cells = "".join(f"{t['forward_ms']:9.2f} {t['training_ms']:8.2f} {t['peak_GiB']:5.2f}" for t in times)
        checked = f"  {entry['worst']} {entry['worst_error']:.1e}" if "worst" in entry else ""
        first = f" {times[0]['first_call_s']:6.1f}" if times else ""
        print(f"{entry['group'][:12]:12s} {entry['name'][:39]:39s}" + cells + checked + first + entry.get("error", ""))


if __name__ == "__main__":
    main()
