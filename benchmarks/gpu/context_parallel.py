"""One text over several GPUs beside the same text on one: equality, time and memory, of an op and of a model.

    torchrun --nproc-per-node 2 benchmarks/gpu/context_parallel.py --out benchmarks/results/context/NAME.json

Every rank computes the whole by itself too, and compares its part: relative RMS error of the output and of every
gradient, in float32 on --check tokens and in bfloat16 on --tokens. A row with an error over its tolerance is red and
has no time. Times are milliseconds a call, the slowest rank's, of --repeats calls after two that do not count; "alone"
is the whole text on one GPU (on each at once), "of which the state" what comes before the op in the forward: the sums
of the part, the messages, and what is made of them. Memory is the peak above the inputs. Where there are more ranks
than GPUs, they share one: messages go by gloo through the host, and times, of ranks that take turns, are no speed.
Rows are written as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from environment import environment
from shapes import ANCHORS, WINDOW, make_layer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, context_part, linearize
from lizard_ops import chunk_hybrid_attn, context_state

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
NAMES = ("q", "k", "v", "fq", "fk", "g", "merge_bias")
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window 1024": {"window": 1024},
    "512 kept keys": {"kept_keys": 512},
}


def tokens_of(length: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs of the op by name, one row, the same on every rank, and the gradient of its output."""
    layer = make_layer(length, device, tokens=length)
    half = layer.phi_q.shape[-1] // 2
    made = {"q": layer.q, "k": layer.k, "v": layer.v, "fq": layer.phi_q[..., :half], "fk": layer.phi_k[..., :half]}
    made = {name: x.detach().to(dtype) for name, x in made.items()}
    made |= {"g": layer.g.detach(), "merge_bias": layer.merge_bias.detach(), "grad": layer.grad.to(dtype)}
    made["scores"] = torch.randn(layer.k.shape[:3], generator=torch.Generator(device).manual_seed(1), device=device)
    return made


def attend(x: dict[str, Tensor], kept_keys: int = 0, window: int = WINDOW, group: Any = None) -> Tensor:
    """The op on these tokens."""
    scored = {"scores": x["scores"], "kept_keys": kept_keys} if kept_keys else {}
    return chunk_hybrid_attn(
        *(x[name] for name in NAMES[:6]),
        window,
        anchors=ANCHORS,
        mix="merge",
        merge_bias=x["merge_bias"],
        coverage="outside",
        feature_map="softmax",
        context_group=group,
        **scored,
    )[0]


def forward_and_backward(x: dict[str, Tensor], with_gradients: bool, **form: Any) -> dict[str, Tensor]:
    """The output, and the gradients of NAMES."""
    if not with_gradients:
        with torch.no_grad():
            return {"o": attend(x, **form)}
    leaves = {name: x[name].detach().requires_grad_() for name in NAMES}
    o = attend(x | leaves, **form)
    return {"o": o} | dict(zip(NAMES, torch.autograd.grad(o, list(leaves.values()), x["grad"]), strict=True))


def part_of(x: dict[str, Tensor], mesh: Any) -> dict[str, Tensor]:
    """This rank's tokens."""
    return {name: t.tensor_split(mesh.size(), 1)[mesh.get_local_rank()].contiguous() for name, t in x.items()}


def errors(found: dict[str, Tensor], whole: dict[str, Tensor], mesh: Any) -> dict[str, float]:
    """Largest relative RMS error over ranks, of what each found against its part of the whole."""
    wanted = part_of(whole, mesh)
    sizes = {name: w.float().norm().clamp_min(1e-30) for name, w in wanted.items()}
    every = torch.stack([(found[name].float() - w.float()).norm() / sizes[name] for name, w in wanted.items()])
    every = torch.where(every.isfinite(), every, 1e9)
    dist.all_reduce(every, dist.ReduceOp.MAX)
    return dict(zip(wanted, every.tolist(), strict=True))


def measured(call: Callable[[], object], repeats: int, on_gpu: bool) -> tuple[float, float]:
    """(milliseconds a call on the slowest rank, GiB above what was there)."""
    before = torch.cuda.memory_allocated() if on_gpu else 0
    for _ in range(2):
        call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    found = [(time.perf_counter() - start) * 1e3 / repeats]
    found.append((torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else 0.0)
    slowest = torch.tensor(found, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return tuple(slowest.tolist())  # type: ignore[return-value]


def op_rows(options: argparse.Namespace, mesh: Any, device: str) -> Iterator[dict[str, Any]]:
    """A row for each form, forward alone and with the backward."""
    on_gpu = device != "cpu"
    for name, form in FORMS.items():
        for trains in (False, True):
            if trains and "kept_keys" in form and options.tokens > options.kept_tokens:
                continue  # gradients of kept keys between states are PyTorch's
            worst = {}
            for dtype, length in ((torch.float32, options.check), (torch.bfloat16, options.tokens)):
                x = tokens_of(length, dtype, device)
                whole = forward_and_backward(x, trains, **form)
                found = forward_and_backward(part_of(x, mesh), trains, group=mesh, **form)
                error = errors(found, whole, mesh)
                worst[str(dtype).removeprefix("torch.")] = error
                del whole, found
            red = any(max(e.values()) > TOLERANCE[getattr(torch, dtype)] for dtype, e in worst.items())
            row: dict[str, Any] = {"form": name, "gradients": trains, "red": red, "errors": worst}
            if not red:
                mine = part_of(x, mesh)
                calls = {
                    "alone": lambda x=x, form=form, trains=trains: forward_and_backward(x, trains, **form),
                    "over ranks": lambda x=mine, form=form, trains=trains: forward_and_backward(
                        x, trains, group=mesh, **form
                    ),
                    "of which the state": lambda x=mine, form=form: state_alone(x, mesh, **form),
                }
                for what, call in calls.items():
                    row[what] = dict(zip(("ms", "GiB"), measured(call, options.repeats, on_gpu), strict=True))
            yield row


def state_alone(x: dict[str, Tensor], mesh: Any, kept_keys: int = 0, window: int = WINDOW) -> None:
    """What is exchanged before the op itself, and the sums that are."""
    scored = {"scores": x["scores"], "kept_keys": kept_keys} if kept_keys else {}
    with torch.no_grad():
        context_state(
            *(x[name] for name in NAMES[:6]), window, anchors=ANCHORS, coverage="outside", feature_map="softmax",
            context_group=mesh, **scored,
        )  # fmt: skip


def model_rows(options: argparse.Namespace, mesh: Any, device: str) -> Iterator[dict[str, Any]]:
    """A student of SmolLM2-135M's shape in training with gradient checkpointing: the sum of its last hidden states."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=options.layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=options.context or options.tokens,
        rope_theta=1e6, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).to(device, torch.bfloat16)
    model = linearize(teacher, LizardConfig.preset("plain")).requires_grad_(False).train()
    learn = [p for _, p in model.stage_parameters()]
    for parameter in learn:
        parameter.requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(49152, (1, options.tokens), generator=torch.Generator().manual_seed(2)).to(device)
    own = context_part({"input_ids": ids}, mesh)

    def step(**inputs: Any) -> list[Tensor]:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return list(torch.autograd.grad(hidden.float().square().mean() * hidden.shape[1] / options.tokens, learn))

    whole, parts = step(input_ids=ids), step(**own)
    for gradient in parts:
        dist.all_reduce(gradient)
    flat = [torch.cat([g.flatten().float() for g in each]) for each in (parts, whole)]
    error = ((flat[0] - flat[1]).norm() / flat[1].norm()).item()
    row: dict[str, Any] = {"form": f"model, {options.layers} layers", "gradients": True, "relative error": error}
    for what, inputs in (("alone", {"input_ids": ids}), ("over ranks", own)):
        found = measured(lambda inputs=inputs: step(**inputs), max(options.repeats // 3, 1), device != "cpu")
        row[what] = dict(zip(("ms", "GiB"), found, strict=True))
    yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=131072, help="positions of the text")
    parser.add_argument("--check", type=int, default=8192, help="positions of the check in float32")
    parser.add_argument("--kept-tokens", type=int, default=16384, help="most positions at which kept keys are trained")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model; 0 leaves it out")
    parser.add_argument("--context", type=int, help="the teacher's, past which anchors move on; default: all positions")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    alone = on_gpu and int(os.environ["WORLD_SIZE"]) <= torch.cuda.device_count()
    dist.init_process_group("nccl" if alone else "gloo")
    device = f"cuda:{dist.get_rank() % torch.cuda.device_count()}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    mesh = init_device_mesh("cuda" if on_gpu else "cpu", (dist.get_world_size(),), mesh_dim_names=("context",))
    about = {"ranks": mesh.size(), "gpus": torch.cuda.device_count(), "tokens": options.tokens, "check": options.check}
    about |= {"environment": environment()} if on_gpu else {}
    rows = []
    for row in chain(op_rows(options, mesh, device), model_rows(options, mesh, device) if options.layers else ()):
        rows.append(row)
        if dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
