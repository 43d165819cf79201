"""Decode a whole model step by step: eager, under torch.compile and in a CUDA graph. Are they equal, and how fast?

    python benchmarks/gpu/decode_graph.py --shape smollm2-135m --out benchmarks/results/decode/NAME.json

Random weights in the shape of a model. First four layers in float32 decode the same tokens every way: the logits of
every step and the state after the last must agree with eager decoding. Then the whole model decodes greedily in
bfloat16 and is timed. A way that disagrees shows its error and no time, and the script ends with 1. A cache that was
moved to the CPU and back, or saved and loaded, must give the same bits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_layers import tensors_of
from lizard_models import LizardCache, LizardConfig, linearize, load_state, save_state

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "llama-3.2-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
    "llama-3-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
TOLERANCE = {"compiled": 1e-4, "graph": 1e-6}  # relative root mean square; a graph launches the kernels of eager
Step = Callable[[Tensor], Tensor]  # ids [B, 1] -> logits [B, 1, vocabulary], good until the next step


def build(args: argparse.Namespace, layers: int | None, dtype: torch.dtype) -> Any:
    shape = SHAPES[args.shape] | ({} if layers is None else {"num_hidden_layers": layers})
    torch.manual_seed(0)
    with torch.device(args.device):
        teacher = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=131072))
        kept = tuple(i for i in args.softmax_layers if i < shape["num_hidden_layers"])
        model = linearize(teacher.to(dtype), LizardConfig.preset(args.preset, softmax_layers=kept))
    return model.eval().requires_grad_(False)


def read_prompt(model: Any, args: argparse.Namespace) -> LizardCache:
    cache = model.new_cache(static=True, max_cache_len=args.prompt + 4 * args.steps + 16)
    draw = torch.Generator(args.device).manual_seed(1)
    ids = torch.randint(0, model.vocab_size, (args.batch, args.prompt), generator=draw, device=args.device)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


def eager(model: Any, cache: LizardCache) -> Step:
    return lambda ids: model(ids, past_key_values=cache).logits


def compiled(model: Any, cache: LizardCache) -> Step:
    on_gpu = next(model.parameters()).is_cuda
    how: dict[str, Any] = {"mode": "reduce-overhead"} if on_gpu else {"backend": "aot_eager"}
    forward = torch.compile(model, fullgraph=True, dynamic=False, **how)

    def step(ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return forward(ids, past_key_values=cache).logits

    return step


def graph(model: Any, cache: LizardCache) -> Step:
    ids = torch.zeros(cache.positions().shape[0], 1, dtype=torch.long, device=cache.positions().device)
    stream, warm = torch.cuda.Stream(), cache.copy()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is compiled and allocated at a first call, on a copy of the state
            model(ids, past_key_values=warm)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        logits = model(ids, past_key_values=cache).logits

    def step(new: Tensor) -> Tensor:
        ids.copy_(new)
        captured.replay()
        return logits

    return step


WAYS: dict[str, Callable[[Any, LizardCache], Step]] = {"eager": eager, "compiled": compiled, "graph": graph}


def error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def fields(cache: LizardCache) -> list[Tensor]:
    return [t for layer in cache.lizard_layers() for t in tensors_of(layer.state).values()]


@torch.no_grad()
def check(args: argparse.Namespace, ways: list[str], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Largest relative errors against eager, of the logits of a step and of the tensors of the state."""
    model = build(args, 4, dtype)
    draw = torch.Generator(args.device).manual_seed(2)
    ids = torch.randint(0, model.vocab_size, (args.batch, 24), generator=draw, device=args.device)
    logits, states, counts = {}, {}, {}
    for way in ways:
        torch.compiler.reset()
        cache = read_prompt(model, args)
        addresses = [t.data_ptr() for t in fields(cache)]
        step = WAYS[way](model, cache)
        logits[way] = torch.cat([step(ids[:, t : t + 1]).clone() for t in range(ids.shape[1])], 1)
        states[way], counts[way] = fields(cache), cache.get_seq_length()
        assert [t.data_ptr() for t in fields(cache)] == addresses, f"{way}: the state has moved"
        assert counts[way] == args.prompt + ids.shape[1], f"{way}: counted {counts[way]} positions"
    return {
        way: {
            "logits": max(error(logits[way][:, t], logits["eager"][:, t]) for t in range(ids.shape[1])),
            "state": max(error(a, b) for a, b in zip(states[way], states["eager"], strict=True)),
        }
        for way in ways
        if way != "eager"
    }


@torch.no_grad()
def check_moves(args: argparse.Namespace) -> dict[str, float]:
    """Errors of the next step from a cache that was on the CPU in between, and from one that was in a file."""
    model = build(args, 4, torch.bfloat16)
    draw = torch.Generator(args.device).manual_seed(3)
    ids = torch.randint(0, model.vocab_size, (args.batch, 64), generator=draw, device=args.device)
    cache = model(ids, logits_to_keep=1).past_key_values
    wanted = eager(model, cache.copy())(ids[:, :1])
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state", model, cache)
        saved = load_state(Path(folder) / "state", model)
    moved = cache.copy().to("cpu").to(args.device)
    return {
        name: error(eager(model, other)(ids[:, :1]), wanted) for name, other in (("moved", moved), ("saved", saved))
    }


@torch.no_grad()
def measure(args: argparse.Namespace, model: Any, way: str) -> dict[str, float]:
    torch.compiler.reset()
    cache = read_prompt(model, args)
    start = time.perf_counter()
    step = WAYS[way](model, cache)
    ids = torch.zeros(args.batch, 1, dtype=torch.long, device=args.device)
    for _ in range(5):
        ids = step(ids)[:, -1:].argmax(-1)
    wait(args)
    first, times = time.perf_counter() - start, []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(args.steps):
            ids = step(ids)[:, -1:].argmax(-1)
        wait(args)
        times.append((time.perf_counter() - start) / args.steps)
    seconds = sorted(times)[1]
    size = sum(p.nbytes for p in model.parameters()) + 2 * sum(t.nbytes for t in fields(cache))
    return {
        "step_ms": 1e3 * seconds,
        "tokens_per_s": args.batch / seconds,
        "gb_per_s": size / seconds / 1e9,  # weights once, state read and written
        "first_steps_s": first,
    }


def wait(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--preset", default="plain")
    parser.add_argument("--softmax-layers", type=int, nargs="*", default=[], help="layers that stay softmax")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512, help="tokens read before decoding")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu: without graphs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ways = [way for way in args.ways if way != "graph" or args.device == "cuda"]
    ways = ["eager", *(way for way in ways if way != "eager")]
    report: dict[str, Any] = {
        "environment": environment() if args.device == "cuda" else {"torch": torch.__version__, "device": "cpu"},
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "errors": check(args, ways, torch.float32),
        "errors_bfloat16": check(args, ways, torch.bfloat16),
        "errors_moves": check_moves(args),
        "times": {},
    }
    for name, found in report["errors_moves"].items():
        print(f"{name} cache: error {found:.1e}" + ("  WRONG" if found else ""))
    wrong = [way for way, found in report["errors"].items() if not max(found.values()) <= TOLERANCE[way]]
    for way, found in report["errors"].items():
        half = report["errors_bfloat16"][way]
        print(
            f"{way}: error against eager {found['logits']:.1e} (logits), {found['state']:.1e} (state); in bfloat16 "
            f"{half['logits']:.1e}, {half['state']:.1e}" + ("  WRONG" if way in wrong else "")
        )
    model = build(args, None, torch.bfloat16)
    for way in ways:
        if way not in wrong:
            report["times"][way] = row = measure(args, model, way)
            print(
                f"{way}: {row['step_ms']:.3f} ms a step, {row['tokens_per_s']:,.0f} tokens/s, {row['gb_per_s']:,.0f} "
                f"GB/s, first steps after {row['first_steps_s']:.1f} s"
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if wrong or any(report["errors_moves"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
