"""``model.generate()`` as everyone calls it: first call, milliseconds a token, tokens a second; teacher and Lizard.

    python benchmarks/gpu/generate.py --shape smollm2-135m --out benchmarks/results/decode/NAME.json
    python benchmarks/gpu/generate.py --shape llama-3-8b --batch 16 --prompt 8192 --prefill-chunk 8192 --out ...

Random weights in the shape of a model, bfloat16, greedy. Ways: ``teacher`` (transformers' growing cache),
``teacher-static`` (its static cache, which transformers compiles: a minute and more), ``lizard`` (as it is called),
``lizard-eager`` (``decode_graph=False``) and ``lizard-static``. A way is called three times: the first call's time is
its own, then the prompt alone and the prompt with all tokens, whose difference is the tokens'. First the Lizard ways
write the same text, whose logits must agree bit for bit: one that disagrees shows its error and no time, and the
script ends with 1. ``floor`` is the time of reading the weights and the state once and writing the state, at the
copy's speed measured in the same run; ``replay`` the time of the captured step alone, by events. On a CPU the ways are
timed as they are, without graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from decode_graph import SHAPES
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, linearize
from lizard_models.files.environment import environment
from lizard_models.model import decode_graph

WAYS: dict[str, dict[str, Any]] = {
    "teacher": {},
    "teacher-static": {"cache_implementation": "static"},
    "lizard": {},
    "lizard-eager": {"decode_graph": False},
    "lizard-static": {"cache_implementation": "static"},
}
SHOWN = ("first_call_s", "prefill_ms", "ms_token", "tokens_s", "replay_ms", "floor_ms", "peak_gib")


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    shape = SHAPES[args.shape] | ({} if args.layers is None else {"num_hidden_layers": args.layers})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if args.device == "cuda" else torch.float32)
    with torch.device(args.device):
        teacher = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=131072))
    torch.set_default_dtype(torch.float32)
    teacher.generation_config.eos_token_id = None
    return teacher.eval().requires_grad_(False)


def prompt(args: argparse.Namespace, length: int) -> Tensor:
    draw = torch.Generator(args.device).manual_seed(1)
    return torch.randint(1, 1000, (args.batch, length), device=args.device, generator=draw)


def clock(args: argparse.Namespace) -> float:
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def settings(args: argparse.Namespace, way: str, tokens: int) -> dict[str, Any]:
    made = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0) | WAYS[way]
    if way == "teacher-static":  # one length of cache for both calls, so that it is compiled once
        made["max_cache_len"] = args.prompt + args.tokens
    return made if args.prefill_chunk is None else made | {"prefill_chunk_size": args.prefill_chunk}


def copy_speed(device: str) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    a = torch.empty(2**30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    b.copy_(a)
    start.record()
    for _ in range(10):
        b.copy_(a)
    end.record()
    torch.cuda.synchronize()
    return 20 * a.nbytes / (1e-3 * start.elapsed_time(end))


def state_bytes(model: Any, args: argparse.Namespace, way: str) -> int:
    """What a step moves beside the weights: the state read and written, or the keys and values read."""
    if way.startswith("teacher"):
        config = model.config
        of_token = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * model.dtype.itemsize
        return args.batch * (args.prompt + args.tokens // 2) * of_token
    return 2 * args.batch * model(prompt(args, 8)[:1], use_cache=True).past_key_values.state_bytes()


def replay_ms(model: Any) -> float | None:
    """Milliseconds of the step that the last call of generate left in the model's pool."""
    pool = decode_graph._pools.get(model)
    if not pool:
        return None
    captured = decode_graph._graphs[pool[-1]]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        captured.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20


@torch.no_grad()
def disagreement(model: Any, args: argparse.Namespace, way: str) -> float:
    """Largest difference of the logits from those of ``lizard-eager``, over 16 tokens; nan where the texts differ."""
    found = []
    for each in ("lizard-eager", way):
        made = settings(args, each, 16) | dict(output_logits=True, return_dict_in_generate=True)
        found.append(model.generate(prompt(args, min(args.prompt, 512)), **made))
    eager, other = found
    if not torch.equal(eager.sequences, other.sequences):
        return float("nan")
    return max((a - b).abs().max().item() for a, b in zip(eager.logits, other.logits, strict=True))


@torch.no_grad()
def measure(model: Any, args: argparse.Namespace, way: str) -> dict[str, Any]:
    ids, on_gpu = prompt(args, args.prompt), args.device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for tokens in (args.tokens, 1, args.tokens, 1, args.tokens, 1, args.tokens):
        start = clock(args)
        model.generate(ids, **settings(args, way, tokens))
        times.append(clock(args) - start)
    first, prefills, wholes = times[0], sorted(times[1::2]), sorted(times[2::2])
    token = (wholes[1] - prefills[1]) / (args.tokens - 1)
    row: dict[str, Any] = {
        "way": way,
        "first_call_s": first,
        "prefill_ms": 1e3 * prefills[1],
        "ms_token": 1e3 * token,
        "tokens_s": args.batch / token,
        "calls_s": times,
    }
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if way == "lizard":
            row["replay_ms"] = replay_ms(model)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens read before decoding")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["teacher", "lizard", "lizard-eager"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report: dict[str, Any] = {"environment": environment(), "arguments": arguments, "rows": []}
    if args.device == "cuda":
        report["copy_bytes_s"] = copy_speed(args.device)
    model: Any = build(args)
    weights, wrong = sum(p.nbytes for p in model.parameters()), False
    for way in sorted(args.ways, key=list(WAYS).index):
        if way.startswith("lizard") and isinstance(model, LlamaForCausalLM) and not hasattr(model, "lizard_attentions"):
            model = linearize(model, LizardConfig.preset("plain")).eval().requires_grad_(False)
            weights = sum(p.nbytes for p in model.parameters())
        row: dict[str, Any] = {"way": way}
        try:
            if way in ("lizard", "lizard-static"):
                row["error"] = disagreement(model, args, way)
                decode_graph.free_decode_graphs(model)
            if row.get("error", 0.0) != 0.0:
                wrong = True
            else:
                row |= measure(model, args, way)
                if args.device == "cuda":
                    row["floor_ms"] = 1e3 * (weights + state_bytes(model, args, way)) / report["copy_bytes_s"]
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except Exception as error:
            row["failed"], wrong = f"{type(error).__name__}: {str(error)[:300]}", True
        decode_graph.free_decode_graphs(model)
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{args.shape}, batch {args.batch}, prompt {args.prompt}, {args.tokens} new tokens")
    print(f"{'':16}" + "".join(f"{name:>14}" for name in SHOWN))
    for row in report["rows"]:
        cells = "".join(f"{row[name]:14.3f}" if row.get(name) is not None else f"{'-':>14}" for name in SHOWN)
        bad = f"  WRONG by {row['error']}" if row.get("error") else ""
        print(f"{row['way']:16}{cells}{bad}{'  ' + row['failed'] if 'failed' in row else ''}")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
