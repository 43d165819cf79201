"""What a call costs its host: launches, operators, Python calls and time, of the teacher (SDPA) and its Lizard.

    python benchmarks/gpu/host_time.py --out benchmarks/results/host/NAME.json
    python benchmarks/gpu/host_time.py --device cpu --no-launch --shapes tiny      # without a GPU: what it would cost
    python benchmarks/gpu/host_time.py --device cpu --prepare --shapes tiny-half   # and what Triton does first

For a layer (``layers[0]``) and a whole model: the forward without gradients (``prefill``, as generate reads a prompt,
into a new cache), forward and backward of a training step (``train``) and a decode step (``decode``), random weights.

    host_us     median microseconds until the call returns, the device idle before; the two models take turns, and
                host_us_turns has the median of each
    whole_us    the same until the device is done
    gpu_us      sum of its kernels, by the profiler
    launches    kernels, copies and fills launched
    ops         operators called, those inside others included
    python      Python functions called, and py_us, the time in them, by cProfile

On a CPU the operators compute inside the host's time, so the shape ``tiny`` has sizes that cost little, and times are
those of the thread. With ``--no-launch`` CPU tensors take the Triton path, whose kernels are counted (``launches``) and
left out: what remains of the host's time is Python, operators and allocations. With ``--prepare`` Triton compiles them
for an H200 (minutes, once) and prepares each launch; the driver's call alone is left out. The shape ``tiny-half`` reads
160 tokens in bfloat16, whose gates take the path of long texts.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import json
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode_graph import SHAPES as MODELS
from no_launch import Launches, without_kernels
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, linearize
from lizard_models.files.environment import environment

SHAPES: dict[str, dict[str, Any]] = MODELS | {
    "tiny": dict(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    ),
}  # fmt: skip
SHAPES["tiny-half"] = SHAPES["tiny"] | {"dtype": "bfloat16"}
SHOWN = ("host_us", "whole_us", "gpu_us", "launches", "ops", "python", "py_us")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaMemcpyAsync",
            "cudaMemsetAsync")  # fmt: skip
Call = Callable[[], Any]


def build(shape: str, layers: int, device: str, window: int) -> tuple[Any, Any]:
    """The teacher and its Lizard, which share their weights."""
    sizes = SHAPES[shape] | {"num_hidden_layers": layers}
    half = sizes.pop("dtype", "bfloat16" if device == "cuda" else "float32") == "bfloat16"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    with torch.device(device):
        teacher = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=131072))
    torch.set_default_dtype(torch.float32)
    config = LizardConfig.preset("plain", attention={"window": window})
    student = linearize(teacher, config).eval().requires_grad_(False)
    return teacher.eval().requires_grad_(False), student


def calls(model: Any, of: str, kind: str, batch: int, length: int) -> Call:
    """The call to be measured."""
    device, decoder = model.device, model.model
    ids = torch.randint(0, decoder.vocab_size, (batch, length), device=device)
    x = torch.randn(batch, length, decoder.config.hidden_size, device=device, dtype=model.dtype)
    layer, one = decoder.layers[0], torch.arange(length, device=device)[None]
    rope = decoder.rotary_emb(x, one)

    if kind == "decode":
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        token, last, at = ids[:, :1], x[:, :1], one[:, -1:] + 1
        turn = decoder.rotary_emb(last, at)

        @torch.no_grad()
        def step() -> Any:
            if of == "layer":
                return layer(last, position_embeddings=turn, position_ids=at, past_key_values=cache, use_cache=True)
            return model(token, position_ids=at.expand(batch, -1), past_key_values=cache, use_cache=True)

        return step
    if kind == "prefill":

        @torch.no_grad()
        def read() -> Any:
            if of == "layer":
                return layer(x, position_embeddings=rope, position_ids=one)
            return model(ids, use_cache=True, logits_to_keep=1)

        return read
    for p in model.parameters():
        p.requires_grad_(True)

    def train() -> None:
        if of == "layer":
            layer(x.detach().requires_grad_(), position_embeddings=rope, position_ids=one)[0].sum().backward()
        else:
            model(ids, use_cache=False).logits.sum().backward()
        model.zero_grad()

    return train


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Call, device: str, times: int) -> tuple[list[float], list[float]]:
    """Seconds until the call returns, and until the device is done, of each call."""
    clock = time.perf_counter if device == "cuda" else time.thread_time
    host, whole = [], []
    synchronize(device)
    gc.disable()
    for _ in range(times):
        start = clock()
        call()
        host.append(clock() - start)
        synchronize(device)
        whole.append(clock() - start)
    gc.enable()
    return host, whole


def by_turns(named: dict[str, Call], device: str, times: int, turns: int) -> dict[str, dict[str, Any]]:
    """Median times of each call. They take turns, forwards and backwards: a host that slows down slows both."""
    host: dict[str, list[list[float]]] = {name: [] for name in named}
    whole: dict[str, list[float]] = {name: [] for name in named}
    for call in named.values():
        for _ in range(3):
            call()
    for turn in range(turns):
        for name in list(named)[:: 1 - 2 * (turn % 2)]:
            one, other = timed(named[name], device, times)
            host[name].append(one)
            whole[name] += other
    return {
        name: {
            "host_us": 1e6 * statistics.median(sum(host[name], [])),
            "host_us_turns": [round(1e6 * statistics.median(turn), 1) for turn in host[name]],
            "whole_us": 1e6 * statistics.median(whole[name]),
        }
        for name in named
    }


def counted(call: Call, device: str, left_out: Launches | None) -> dict[str, float]:
    """What one call does, and the time in its Python functions."""
    before = 0 if left_out is None else left_out.count()
    call()
    kernels = 0 if left_out is None else left_out.count() - before
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as trace:
        call()
        synchronize(device)
    averages = trace.key_averages()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(5):
        call()
    profiler.disable()
    synchronize(device)
    stats: Any = pstats.Stats(profiler)
    return {
        "gpu_us": float(sum(e.self_device_time_total for e in averages)) if device == "cuda" else 0.0,
        "launches": kernels + sum(e.count for e in averages if e.key in LAUNCHES),
        "ops": sum(e.count for e in averages if "::" in e.key),
        "python": sum(n for file, (_, n, *_) in stats.stats.items() if file[0] != "~") // 5,
        "py_us": 1e6 * sum(t for file, (_, _, t, *_) in stats.stats.items() if file[0] != "~") / 5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["smollm2-135m", "llama-3-8b"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument(
        "--kinds", nargs="*", choices=("prefill", "train", "decode"), default=["prefill", "train", "decode"]
    )
    parser.add_argument("--calls", type=int, default=20, help="of each of the two models a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-launch", action="store_true", help="on a CPU: the Triton path without its kernels")
    parser.add_argument("--prepare", action="store_true", help="as --no-launch, but what the driver does")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    left = args.no_launch or args.prepare
    if left and args.device != "cpu":
        parser.error("--no-launch and --prepare are for --device cpu")
    if left:
        torch.set_num_threads(1)
    with without_kernels(args.prepare) if left else contextlib.nullcontext() as left_out:
        report = rows(args, left_out)
    print_table(args, report)


def rows(args: argparse.Namespace, left_out: Launches | None) -> dict[str, Any]:
    """All measurements, written to ``--out`` as they are made."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report: dict[str, Any] = {"environment": environment(), "arguments": arguments, "rows": []}
    for shape in args.shapes:
        length, window = {"tiny": (16, 8), "tiny-half": (160, 8)}.get(shape, (args.length, 128))
        for of in ("layer", "model"):
            for kind in args.kinds:
                models = dict(zip(("teacher", "lizard"), build(shape, args.layers, args.device, window), strict=True))
                named = {name: calls(model, of, kind, args.batch, length) for name, model in models.items()}
                times = by_turns(named, args.device, args.calls, args.turns)
                for name, call in named.items():
                    row: dict[str, Any] = {"shape": shape, "of": of, "kind": kind, "model": name}
                    report["rows"].append(row | times[name] | counted(call, args.device, left_out))
                if args.out:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def print_table(args: argparse.Namespace, report: dict[str, Any]) -> None:
    sizes = f"batch {args.batch}, {args.length} tokens, {args.layers} layers"
    print(f"{sizes}, medians of {args.turns} turns of {args.calls} calls")
    print(f"{'':40}" + "".join(f"{name:>11}" for name in SHOWN))
    for teacher, lizard in zip(report["rows"][::2], report["rows"][1::2], strict=True):
        for row in (teacher, lizard):
            named = f"{row['shape']} {row['of']} {row['kind']} {row['model']}"
            print(f"{named:40}" + "".join(f"{row[name]:11.0f}" for name in SHOWN))
        print(
            f"{'':40}"
            + "".join(f"{lizard[n] / max(teacher[n], 1e-9):11.2f}" if teacher[n] else f"{'':11}" for n in SHOWN)
        )


if __name__ == "__main__":
    main()
