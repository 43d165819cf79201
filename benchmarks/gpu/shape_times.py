"""Time the ops at other head dims, groups, lengths and gates on the GPU at hand, decode and the first call too.

    python benchmarks/gpu/shape_times.py --out benchmarks/results/kernels/NAME.json [--only dims] [--workers 14]

Workers first compile every kernel side by side; the times are then taken by one process. Medians, bfloat16, batch times
length about 32768, 8 key heads unless the row says otherwise. Each row stands against a power of two: ``ratio`` is time
over its time (the goal is 1.3), ``per element`` the same for each query element (heads x dim x tokens).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import environment
from timing import median_ms
from torch import Tensor
from triton.testing import do_bench

import lizard_ops

WINDOW, ANCHORS, SINKS = 128, 4, 4
OPS = ("gated key", "window", "hybrid")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: an op at a shape, and the row it stands against."""

    group: str
    op: str
    heads: int = 32
    key_heads: int = 8
    dim: int = 128
    length: int = 2048
    tokens: int = 32768
    against: str = ""

    @property
    def name(self) -> str:
        return f"{self.op} {self.heads}/{self.key_heads} heads, dim {self.dim}, T {self.length}"

    @property
    def elements(self) -> int:
        return self.heads * self.dim * (self.tokens // self.length) * self.length

    def near(self, **changes: int) -> Setting:
        """This row against the one with these changes."""
        return dataclasses.replace(self, against=dataclasses.replace(self, **changes).name)


@dataclasses.dataclass
class Inputs:
    """What the ops read: [B, T, H, D] in bfloat16, pre-activations of half the head dim (64 at most), float32 gates."""

    q: Tensor
    k: Tensor
    v: Tensor
    fq: Tensor
    fk: Tensor
    phi_q: Tensor
    phi_k: Tensor
    gates: dict[str, Tensor]
    sinks: Tensor
    merge_bias: Tensor
    grad: Tensor


def inputs_of(length: int, heads: int, key_heads: int, dim: int, tokens: int = 32768, device: str = "cuda") -> Inputs:
    generator, rows, pre = torch.Generator(device).manual_seed(0), max(1, tokens // length), min(dim // 2, 64)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    def features(count: int) -> Tensor:
        x = normal(rows, length, count, dim // 2)
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).requires_grad_()

    shapes = {"scalar": (1,), "key": (key_heads,), "query": (heads,), "channel": (key_heads, dim)}
    gates = {
        name: F.logsigmoid(normal(rows, length, *shape, dtype=torch.float32) + 5.0).requires_grad_()
        for name, shape in shapes.items()
    }
    tensors = [
        normal(rows, length, count, size).requires_grad_()
        for count, size in ((heads, dim), (key_heads, dim), (key_heads, dim), (heads, pre), (key_heads, pre))
    ]
    return Inputs(
        *tensors, features(heads), features(key_heads), gates,
        normal(heads, SINKS, dtype=torch.float32).requires_grad_(),
        normal(heads, dtype=torch.float32).requires_grad_(), normal(rows, length, heads, dim),
    )  # fmt: skip


Run = Callable[[Inputs], tuple[Tensor, list[Tensor]]]  # output, and what gets a gradient


def gated(gate: str, **options) -> Run:
    def run(x: Inputs) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.phi_q, x.phi_k, x.v, x.gates[gate]]
        return lizard_ops.chunk_gated_attn(*leaves, **options)[0], leaves

    return run


def window(x: Inputs) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.q, x.k, x.v]
    return lizard_ops.window_attn(*leaves, WINDOW, anchors=ANCHORS, sinks=x.sinks)[0], [*leaves, x.sinks]


def hybrid(gate: str, mix: str, **options) -> Run:
    def run(x: Inputs) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.q, x.k, x.v, x.fq, x.fk, x.gates[gate]]
        merge = {"mix": "merge", "coverage": "outside", "merge_bias": x.merge_bias}
        extra = merge if mix == "merge" else {"mix": "sum", "coverage": "all", "sinks": x.sinks}
        extra |= {"feature_map": "softmax"} | options
        o, _ = lizard_ops.chunk_hybrid_attn(*leaves, WINDOW, anchors=ANCHORS, **extra)
        return o, [*leaves, x.merge_bias if mix == "merge" else x.sinks]

    return run


RUNS: dict[str, Run] = {f"gated {gate}": gated(gate) for gate in ("scalar", "key", "query", "channel")} | {
    "gated absorbed": gated("key", gate_form="absorbed"),
    "window": window,
    "hybrid": hybrid("key", "merge"),
    "hybrid query": hybrid("query", "merge"),
    "hybrid sum": hybrid("key", "sum"),
    "hybrid exp": hybrid("key", "merge", feature_map="exp"),
    "hybrid capped": hybrid("key", "merge", softcap=50.0),
}


def settings() -> list[Setting]:
    base = [Setting("base", op) for op in OPS]
    rows = list(base)
    for row in base:
        at = dataclasses.replace(row, group="dims")
        rows += [dataclasses.replace(at, dim=80).near(dim=128), dataclasses.replace(at, dim=96).near(dim=128)]
        rows += [dataclasses.replace(at, dim=64), dataclasses.replace(at, dim=256)]
        at = dataclasses.replace(row, group="groups")
        rows += [dataclasses.replace(at, heads=24).near(heads=32)]
        rows += [dataclasses.replace(at, heads=8), dataclasses.replace(at, heads=64)]
        at = dataclasses.replace(row, group="lengths")
        rows += [dataclasses.replace(at, length=n).near(length=2048) for n in (2047, 1999, 32749)]
    stable = Setting("gates", "gated key")
    for op in ("gated scalar", "gated query", "gated channel", "gated absorbed"):
        rows.append(dataclasses.replace(stable, op=op, against=stable.name))
    merged = Setting("gates", "hybrid")
    for op in ("hybrid query", "hybrid sum", "hybrid exp", "hybrid capped"):
        rows.append(dataclasses.replace(merged, op=op, against=merged.name))
    return rows


def calls(row: Setting) -> tuple[Callable[[], object], Callable[[], object]]:
    """The forward pass, and forward and backward."""
    run, x = RUNS[row.op], inputs_of(row.length, row.heads, row.key_heads, row.dim, row.tokens)

    def forward() -> object:
        with torch.no_grad():
            return run(x)

    def train() -> object:
        o, leaves = run(x)
        return torch.autograd.grad(o, leaves, x.grad, allow_unused=True)

    return forward, train


def measure(row: Setting, milliseconds: int, graph: bool) -> dict[str, float]:
    forward, train = calls(row)
    forward(), train()
    graph = graph and row.op != "gated absorbed"  # which reads its bound back
    return {f"{n}_ms": median_ms(x, milliseconds, graph) for n, x in (("forward", forward), ("training", train))}


def compile_all(only: str, workers: int) -> None:
    """Fill Triton's cache from several processes; rows are dealt out in turn."""
    command = [sys.executable, __file__, "--out", os.devnull, "--only", only, "--compile"]
    running = [subprocess.Popen([*command, f"{n}/{workers}"], stdout=subprocess.DEVNULL) for n in range(workers)]
    for process in running:
        process.wait()


def compile_share(rows: list[Setting], share: str) -> None:
    part, parts = map(int, share.split("/"))
    for row in rows[part::parts]:
        small = dataclasses.replace(row, tokens=row.length)  # kernels do not depend on the batch
        try:
            for call in calls(small):
                call()
        except Exception as error:
            print(f"{row.name}: {error}", file=sys.stderr)


def copy_speed() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 2 GiB."""
    a, b = (torch.empty(2**31, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * a.numel() / (do_bench(lambda: b.copy_(a), return_mode="median") / 1e3)


def decode(heads: int, key_heads: int, dim: int, batch: int, speed: float) -> dict[str, float | str]:
    """One step of the form of ``plain`` in a CUDA graph, against reading and writing the whole state."""
    pre = min(dim // 2, 64)
    x = inputs_of(WINDOW + 72, heads, key_heads, dim, tokens=batch * (WINDOW + 72))
    form = {"mix": "merge", "coverage": "outside", "merge_bias": x.merge_bias.detach(), "feature_map": "softmax"}
    with torch.no_grad():
        tokens = [x.q, x.k, x.v, x.fq, x.fk, x.gates["key"]]
        state = lizard_ops.chunk_hybrid_attn(*tokens, WINDOW, anchors=ANCHORS, output_final_state=True, **form)[1]
        one = [t[:, :1].contiguous() for t in tokens]
        form |= {"anchors": ANCHORS, "output_final_state": True, "inplace": True, "impl": "triton"}
        state = state._make(None if t is None else t.contiguous() for t in state)
        lizard_ops.recurrent_hybrid_attn(*one, WINDOW, initial_state=state, **form)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lizard_ops.recurrent_hybrid_attn(*one, WINDOW, initial_state=state, **form)
        microseconds = do_bench(graph.replay, rep=200, return_mode="median") * 1e3
    size = sum(t.nbytes for t in state if t is not None)
    copy = 2 * size / speed * 1e6
    name = f"decode {heads}/{key_heads} heads, dim {dim}, {2 * pre} features, batch {batch}"
    return {"group": "decode", "name": name, "step_us": microseconds, "copy_us": copy, "ratio": microseconds / copy}


FIRST = """
import sys, time
sys.path.insert(0, {folder!r})
from shape_times import Setting, calls
import torch
train = calls(Setting("first", {op!r}))[1]
torch.cuda.synchronize()
start = time.perf_counter()
train()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_call(op: str) -> dict[str, float | str]:
    """Seconds of the first forward and backward in a new process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        code = FIRST.format(folder=str(Path(__file__).parent), op=op)
        fresh = os.environ | {"TRITON_CACHE_DIR": cache}
        done = subprocess.run([sys.executable, "-c", code], env=fresh, check=True, capture_output=True, text=True)
    return {"group": "first call", "name": op, "seconds": float(done.stdout.split()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--only", default="", help="groups to measure, comma-separated: base, dims, groups, lengths, "
                        "gates, decode, first; rows that others stand against come along")  # fmt: skip
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--milliseconds", type=int, default=60, help="time spent on each median")
    parser.add_argument("--graph", action="store_true", help="time replays of a CUDA graph of each call")
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = {name for name in options.only.split(",") if name}
    rows = settings()
    rows = [row for row in rows if not asked or row.group in asked or row.group == "base"]
    if options.compile:
        compile_share(rows, options.compile)
        return
    start = time.perf_counter()
    compile_all(options.only, options.workers)
    print(f"{len(rows)} rows compiled by {options.workers} processes in {time.perf_counter() - start:.0f} s")
    results: dict = {"environment": environment(), "rows": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def note(entry: dict) -> None:
        results["rows"].append(entry)
        options.out.write_text(json.dumps(results, indent=1))

    def attempt(group: str, name: str, run: Callable[[], dict]) -> None:
        try:
            note({"group": group, "name": name} | run())
        except Exception as error:  # a row that fails must not hide the others
            first = (str(error).strip().splitlines() or [""])[0]
            note({"group": group, "name": name, "error": f"{type(error).__name__}: {first[:150]}"})
        torch.cuda.empty_cache()

    for row in rows:
        shape = {"against": row.against, "elements": row.elements}
        attempt(
            row.group, row.name, lambda row=row, shape=shape: shape | measure(row, options.milliseconds, options.graph)
        )
    if not asked or "decode" in asked:
        speed = copy_speed()
        note({"group": "copy", "name": "device to device, GB/s read and written", "speed": speed / 1e9})
        for heads, key_heads, dim in ((32, 8, 128), (9, 3, 64)):
            attempt("decode", f"{heads}/{key_heads}", lambda h=heads, k=key_heads, d=dim: decode(h, k, d, 64, speed))
    if not asked or "first" in asked:
        for op in OPS:
            attempt("first call", op, lambda op=op: first_call(op))
    add_ratios(results["rows"])
    options.out.write_text(json.dumps(results, indent=1))
    print_table(results, time.perf_counter() - start)


def add_ratios(rows: list[dict]) -> None:
    """Each row's time over that of the row it stands against, whole and for each query element."""
    timed = {row["name"]: row for row in rows if "training_ms" in row}
    for row in timed.values():
        other = timed.get(row["against"])
        if other is not None:
            for kind in ("forward", "training"):
                row[f"{kind}_ratio"] = row[f"{kind}_ms"] / other[f"{kind}_ms"]
                row[f"{kind}_per_element"] = row[f"{kind}_ratio"] * other["elements"] / row["elements"]


def print_table(results: dict, seconds: float) -> None:
    print(results["environment"])
    print(f"{'forward / forward + backward':58s}{'ms':>16s}{'ratio':>14s}{'per element':>14s}")
    for row in results["rows"]:
        cells = f"{row['group'][:10]:10s} {row['name'][:46]:47s}"
        if "error" in row:
            cells += row["error"]
        elif "training_ms" in row:
            cells += f"{row['forward_ms']:8.3f}{row['training_ms']:8.3f}"
            for kind in ("ratio", "per_element"):
                if f"forward_{kind}" in row:
                    cells += f"{row[f'forward_{kind}']:8.2f}{row[f'training_{kind}']:6.2f}"
        elif "step_us" in row:
            cells += f"{row['step_us']:8.1f} us, {row['ratio']:.2f} of the copy of its state ({row['copy_us']:.1f} us)"
        elif "speed" in row:
            cells += f"{row['speed']:8.0f}"
        else:
            cells += f"{row['seconds']:8.1f} s"
        print(cells)
    print(f"{seconds:.0f} s in all")


if __name__ == "__main__":
    main()
