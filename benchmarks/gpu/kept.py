r"""Check and time the layer whose keys expire, beside the same layer without kept keys and full attention.

    python benchmarks/gpu/kept.py [--check] [--time] [--profile] [--decode [--variants]] [--graph] \
        [--dims 128,64] [--out FILE.json]

Without a choice all four run. Checks: outputs and gradients against PyTorch in float64, beside the errors of PyTorch
in the dtype under test, and two runs bit for bit. Times: medians of CUDA-event times (--graph: of replays of a CUDA
graph), memory the peak above the inputs. Scores: "random" (few keys outlive the window, for long), "rising" (every key
does, for as many queries as there are places) and "drift" (both). Decode steps and prefill in pieces: kept_decode.py.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from environment import environment
from kept_decode import measure, print_table
from rows import full_attention
from shapes import ANCHORS, LENGTHS, WINDOW, LayerInputs, make_layer
from timing import median_ms
from torch import Tensor

import lizard_ops
from lizard_ops.hybrid_attn.triton.kept_gates import entering_gates
from lizard_ops.hybrid_attn.triton.kept_index import entering, index_of
from lizard_ops.hybrid_attn.triton.kept_op import described

PLACES = 256
MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax"}
SUM = {"mix": "sum", "coverage": "all", "feature_map": "softmax"}
CASES = {  # name: (dtype, head dim, gate heads of 8 query and 2 key heads, rows, options)
    "merge bf16": (torch.bfloat16, 128, 2, "plain", MERGE),
    "merge fp32": (torch.float32, 64, 1, "plain", MERGE),
    "sum all bf16 padded": (torch.bfloat16, 128, 2, "padded", SUM),
    "exp bf16 packed, gate a query head": (torch.bfloat16, 128, 8, "packed", MERGE | {"feature_map": "exp"}),
    "sum identity fp16": (torch.float16, 64, 0, "plain", {"mix": "sum", "coverage": "outside", "normalize": False}),
}
Run = Callable[[], object]


def scores_of(kind: str, rows: int, length: int, heads: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    random = torch.randn(rows, length, heads, generator=generator, device="cuda")
    rising = torch.arange(length, device="cuda").view(1, -1, 1)
    return {"random": random, "rising": random * 0 + rising, "drift": random + rising / 512}[kind]


def check(name: str, length: int = 1300, window: int = 128, places: int = 96) -> dict[str, object]:
    """Relative RMS errors of output and gradients, of the kernels and of PyTorch, in the dtype of the case."""
    dtype, dim, gates, kind, options = CASES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    rows: dict[str, Tensor] = {}
    if kind == "packed":
        rows["cu_seqlens"] = torch.tensor([0, 500, 501, 501, length], device="cuda")
    if kind == "padded":
        rows["padding_mask"] = torch.rand(1, length, generator=generator, device="cuda") > 0.2

    def normal(heads: int, *dim: int) -> Tensor:
        return torch.randn(1, length, heads, *dim, generator=generator, device="cuda").to(dtype)

    x = {"q": normal(8, dim), "k": normal(2, dim), "v": normal(2, dim)}
    x |= {"fq": normal(8, dim // 2), "fk": normal(2, dim // 2)}
    if "feature_map" not in options:
        x |= {"fq": x["fq"].abs(), "fk": x["fk"].abs()}
    x["g"] = F.logsigmoid(normal(gates).float() + 4) if gates else None
    expiry = lizard_ops.key_expiry(
        scores_of("drift", 1, length, 2).round(), window, ANCHORS, places, impl="torch", **rows
    ).expiry
    grad = normal(8, dim)

    def run(dtype: torch.dtype | None, impl: str) -> dict[str, Tensor]:
        given = {n: None if t is None else t.detach().to(dtype or t.dtype) for n, t in x.items()}
        leaves = {n: t.requires_grad_() for n, t in given.items() if t is not None}
        o, _ = lizard_ops.chunk_hybrid_attn(
            **given, window=window, anchors=ANCHORS, expiry=expiry, kept_keys=places, impl=impl, **rows, **options
        )
        grads = torch.autograd.grad(o, list(leaves.values()), grad.to(o.dtype))
        return {"o": o.detach(), **dict(zip(leaves, grads, strict=True))}

    exact, plain = run(torch.float64, "torch"), run(None, "torch")
    ours, again = run(None, "triton"), run(None, "triton")

    def errors(found: dict[str, Tensor]) -> dict[str, float]:
        return {n: ((found[n].double() - t).norm() / t.norm().clamp_min(1e-30)).item() for n, t in exact.items()}

    same = all(torch.equal(t, again[n]) for n, t in ours.items())
    return {"ours": errors(ours), "torch": errors(plain), "deterministic": same}


def narrow(x: LayerInputs, dim: int) -> LayerInputs:
    """The layer with heads of this dim and as many features."""
    cut = {n: t.detach() for n, t in vars(x).items()}
    for n in ("q", "k", "v", "grad"):
        cut[n] = cut[n][..., :dim].contiguous()
    for n in ("q_map", "k_map"):
        cut[n] = cut[n][:, :dim, : dim // 2].contiguous()
    return LayerInputs(**{n: t.requires_grad_(n != "grad") for n, t in cut.items()})


def layer(x: LayerInputs, expiry: Tensor | None) -> Tensor:
    (q, fq), (k, fk) = (
        lizard_ops.project_heads(heads, weight, reuse_gradient=True)
        for heads, weight in ((x.q, x.q_map), (x.k, x.k_map))
    )
    kept = {} if expiry is None else {"expiry": expiry, "kept_keys": PLACES}
    o, _ = lizard_ops.chunk_hybrid_attn(
        q, k, x.v, fq, fk, x.g, WINDOW, anchors=ANCHORS, merge_bias=x.merge_bias, impl="triton", **MERGE, **kept
    )
    return o


def measured(run: Callable[[], Tensor], x: LayerInputs, milliseconds: int, graph: bool) -> dict[str, float]:
    inputs = [t for t in vars(x).values() if t.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            run()

    def train() -> None:
        torch.autograd.grad(run(), inputs, x.grad, allow_unused=True)

    train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    forward_ms, training_ms = (median_ms(call, milliseconds, graph) for call in (forward, train))
    return {"forward_ms": forward_ms, "training_ms": training_ms, "peak_GiB": peak / 2**30}


def preparation(x: LayerInputs, scores: Tensor, expiry: Tensor, milliseconds: int, graph: bool) -> dict[str, float]:
    """Milliseconds of what a forward does beside its branches, and of key_expiry."""
    fk = x.k.detach()[..., : x.k_map.shape[2]].contiguous()
    given = {
        "q": x.q, "k": x.k, "v": x.v, "fq": x.q[..., : fk.shape[3]], "fk": fk, "g": x.g, "weight": None, "sink": None,
        "cu_seqlens": None, "lengths": None, "window": WINDOW, "anchors": ANCHORS, "outside": True, "mix": "relative",
        "normalize": True, "feature_map": "softmax", "scale": 1.0, "feature_scale": 1.0, "softcap": None,
    }  # fmt: skip
    _, _, shape, stream = described(given)
    index = index_of(expiry, PLACES, stream, shape)
    runs: dict[str, Run] = {
        "lists": lambda: index_of(expiry, PLACES, stream, shape),
        "gates": lambda: entering_gates(fk, x.g.detach(), index, stream, shape),
        "rows": lambda: (entering(fk, index.source, stream), entering(x.v.detach(), index.source, stream)),
    }
    found = {name: median_ms(run, milliseconds, graph) for name, run in runs.items()}
    for impl in ("torch", "triton"):
        try:
            run = partial(lizard_ops.key_expiry, scores, WINDOW, ANCHORS, PLACES, impl=impl)
            found[f"key_expiry {impl}"] = median_ms(run, milliseconds, graph and impl == "triton")
        except Exception:
            traceback.print_exc()
    return found


def profile(length: int, kind: str) -> dict[str, float]:
    """Microseconds of each kernel of a training step."""
    x = make_layer(length)
    scores = scores_of(kind, x.k.shape[0], length, x.k.shape[2])
    expiry = lizard_ops.key_expiry(scores, WINDOW, ANCHORS, PLACES, impl="torch").expiry
    inputs = [t for t in vars(x).values() if t.requires_grad]
    torch.autograd.grad(layer(x, expiry), inputs, x.grad, allow_unused=True)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            torch.autograd.grad(layer(x, expiry), inputs, x.grad, allow_unused=True)
        torch.cuda.synchronize()
    events = [e for e in trace.key_averages() if e.self_device_time_total > 0]
    return {e.key[:60]: e.self_device_time_total / 5 for e in sorted(events, key=lambda e: -e.self_device_time_total)}


def timed(dim: int, milliseconds: int, graph: bool) -> list[dict]:
    found = []
    for length in LENGTHS:
        x = make_layer(length) if dim == 128 else narrow(make_layer(length), dim)
        runs: dict[str, Callable[[], Tensor]] = {
            "full attention": partial(full_attention, x),
            "kept_keys=0": partial(layer, x, None),
        }
        prepared: dict[str, float] = {}
        for kind in ("random", "drift", "rising"):
            scores = scores_of(kind, x.k.shape[0], length, x.k.shape[2])
            expiry = lizard_ops.key_expiry(scores, WINDOW, ANCHORS, PLACES, impl="torch").expiry
            runs[f"kept_keys={PLACES}, {kind}"] = partial(layer, x, expiry)
            prepared = prepared or preparation(x, scores, expiry, milliseconds, graph)
        entry = {"dim": dim, "length": length, "preparation_ms": prepared}
        for name, run in runs.items():
            try:
                entry[name] = measured(run, x, milliseconds, graph)
            except Exception:
                traceback.print_exc()
        found.append(entry)
        del x, runs, run
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("check", "time", "profile", "decode", "variants", "graph"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--dims", default="128", help="head dims to time: 128, 64 or both")
    parser.add_argument("--milliseconds", type=int, default=100, help="time spent on each median")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    every = not (options.check or options.time or options.profile or options.decode)
    results: dict = {"environment": environment(), "checks": {}, "times": [], "profiles": {}}

    def write() -> None:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1))

    for name in CASES if options.check or every else ():
        try:
            results["checks"][name] = check(name)
        except Exception as error:
            traceback.print_exc()
            results["checks"][name] = {"error": f"{type(error).__name__}: {error}"[:200]}
        write()
    for dim in map(int, options.dims.split(",")) if options.time or every else ():
        results["times"] += timed(dim, options.milliseconds, options.graph)
        write()
    for length, kind in ((2048, "random"), (32768, "random"), (2048, "rising")) if options.profile or every else ():
        try:
            results["profiles"][f"{length} {kind}"] = profile(length, kind)
        except Exception:
            traceback.print_exc()
        write()
    if options.decode or every:
        results["decode"] = measure(options.milliseconds, options.variants)
        write()
    print_tables(results)


def print_tables(results: dict) -> None:
    print(results["environment"])
    for name, kernels in results["profiles"].items():
        print(f"T = {name}: {sum(kernels.values()):.0f} microseconds")
        for kernel, microseconds in list(kernels.items())[:28]:
            print(f"  {microseconds:8.1f} {kernel}")
    for name, found in results["checks"].items():
        if "error" in found:
            print(f"{name}: {found['error']}")
            continue
        errors = "  ".join(f"{n} {e:.1e} ({found['torch'][n]:.1e})" for n, e in found["ours"].items())
        print(f"{name}: {'' if found['deterministic'] else 'NOT '}deterministic; error (PyTorch's): {errors}")
    for entry in results["times"]:
        print(f"dim {entry['dim']}, T = {entry['length']}: forward / training ms, peak GiB")
        base = entry.get("kept_keys=0")
        for name, row in entry.items():
            if isinstance(row, dict) and "training_ms" in row:
                more = f"  {row['training_ms'] / base['training_ms']:.2f} times kept_keys=0" if base else ""
                print(f"  {name:28s} {row['forward_ms']:7.2f} {row['training_ms']:7.2f} {row['peak_GiB']:6.2f}{more}")
        print("  beside: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in entry["preparation_ms"].items()))
    if "decode" in results:
        print_table(results["decode"])


if __name__ == "__main__":
    main()
