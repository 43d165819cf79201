"""Does a static cache end in a crash? Each case in a process of its own, whose end is told.

    git archive 0c0c9ba^ lizard_ops lizard_layers lizard_models | tar x -C build/old    # with mkdir -p build/old before
    python benchmarks/gpu/static_crash.py --old build/old --out benchmarks/results/decode/NAME.json

``generate(cache_implementation="static", prefill_chunk_size=8192)`` of an 8B shape at batch 16 ended in a segmentation
fault in inductor's CUDA graph trees. Up to commit b468a71 (0c0c9ba^) the pieces of the prompt were compiled, as
transformers compiles them; so the state was first allocated inside a captured region and then handed back to the
compiled step, which writes to it in place. PyTorch ends a process that does that (its issue 192748), whatever the
model: ``pytorch`` is that case in a few lines. ``old-pieces`` is the call that crashed, ``old-whole`` the same without
pieces, where the state is allocated before anything is captured, ``now-pieces`` the call of today, ``now-compiled`` the
same with a ``compile_config``, so with transformers' compiled step, and ``now-whole-model`` a model that a user
compiles, prompt and steps, with a new cache of ``new_cache(static=True)``.

Width and batch are those of the 8B shape, with two layers (``--layers 32`` for all: minutes of compiling a case).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
SHOWN = 6  # lines of a case's last words


def shape(args: argparse.Namespace) -> dict[str, Any]:
    if args.device == "cpu":
        wide = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2)
    else:
        wide = dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
        )
    return wide | {"num_hidden_layers": args.layers, "max_position_embeddings": 131072}


def lizard(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and a prompt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lizard_models import LizardConfig, linearize

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if args.device == "cuda" else torch.float32)
    with torch.device(args.device):
        teacher = LlamaForCausalLM(LlamaConfig(**shape(args)))
    torch.set_default_dtype(torch.float32)
    teacher.generation_config.eos_token_id = None
    model = linearize(teacher, LizardConfig.preset("plain")).eval().requires_grad_(False)
    return model, torch.randint(1, 60, (args.batch, args.prompt), device=args.device)


def generated(args: argparse.Namespace, pieces: bool, **options: Any) -> None:
    model, ids = lizard(args)
    made: dict[str, Any] = dict(max_new_tokens=args.tokens, do_sample=False, pad_token_id=0, **options)
    if pieces:
        made["prefill_chunk_size"] = args.prompt
    for _ in range(2):
        found = model.generate(ids, cache_implementation="static", **made)
    print("wrote", tuple(found.shape))


def compiled_step(args: argparse.Namespace) -> None:
    from transformers import CompileConfig

    generated(args, pieces=True, compile_config=CompileConfig())


def compiled_model(args: argparse.Namespace) -> None:
    import torch

    model, ids = lizard(args)
    forward = torch.compile(model, mode="reduce-overhead" if args.device == "cuda" else "default")
    cache = model.new_cache(static=True, max_cache_len=args.prompt + args.tokens)
    with torch.no_grad():
        for _ in range(args.tokens):
            torch.compiler.cudagraph_mark_step_begin()
            ids = forward(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    print("wrote", args.tokens)


def pytorch(args: argparse.Namespace) -> None:
    """A buffer made in a compiled call, and changed in place by those that follow."""
    import torch

    def call(x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        kept = x.clone() if kept is None else kept
        return kept.mul_(0.5).add_(x)

    compiled = torch.compile(call, mode="reduce-overhead" if args.device == "cuda" else "default")
    kept = None
    for _ in range(6):
        kept = compiled(torch.ones(16, device=args.device), kept)
    print("kept", kept[0].item())  # type: ignore[index]


CASES: dict[str, Callable[[argparse.Namespace], None]] = {
    "pytorch": pytorch,
    "old-pieces": lambda args: generated(args, pieces=True),
    "old-whole": lambda args: generated(args, pieces=False),
    "now-pieces": lambda args: generated(args, pieces=True),
    "now-compiled": compiled_step,
    "now-whole-model": compiled_model,
}


def ended(code: int) -> str:
    """What an exit code says."""
    if code < 0:
        return {signal.SIGSEGV: "segmentation fault", signal.SIGKILL: "out of time"}.get(-code, f"signal {-code}")
    return "done" if code == 0 else f"error (exit code {code})"


def run(command: list[str], seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """How a command ended, and its last words."""
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    ) as child:
        try:
            said, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
    words = said.strip().splitlines()
    fault = next((i for i, line in enumerate(words) if line.startswith("Fatal Python error")), len(words) - SHOWN)
    first = max(0, fault)
    return {
        "ended": ended(child.returncode),
        "seconds": time.perf_counter() - started,
        "said": words[first : first + 2 * SHOWN],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="folder with the packages of a commit before 0c0c9ba")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=180, help="for each case")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--in-this-process", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        CASES[args.in_this_process](args)
        return 0
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report: dict[str, Any] = {"arguments": arguments, "command": shlex.join(["python", *sys.argv]), "rows": []}
    same = [f"--{name}={getattr(args, name)}" for name in ("layers", "batch", "prompt", "tokens", "device")]
    for case in args.cases:
        if case.startswith("old") and args.old is None:
            print(f"{case}: left out, as --old names no folder")
            continue
        packages = str(args.old.resolve() if case.startswith("old") else ROOT)
        path = os.pathsep.join([packages, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-X", "faulthandler", str(HERE), "--in-this-process", case, *same]
        row = {"case": case} | run(command, args.seconds, os.environ | {"PYTHONPATH": path})
        report["rows"].append(row)
        print("\n    ".join([f"{case}: {row['ended']} after {row['seconds']:.0f} s", *row["said"]]), flush=True)
        if args.out:
            from lizard_models.files.environment import environment

            report["environment"] = environment()
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n" + "\n".join(f"{row['case']:16} {row['ended']:20} {row['seconds']:6.0f} s" for row in report["rows"]))
    return int(any(row["case"].startswith("now") and row["ended"] != "done" for row in report["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
