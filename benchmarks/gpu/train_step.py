"""Where the time of a training step goes: stage 1 and stage 2 of a model, random weights, beside its teacher.

    python benchmarks/gpu/train_step.py --out benchmarks/results/training/NAME.json
    python benchmarks/gpu/train_step.py --shape llama-3-8b --sizes 1x2048 1x8192 --stages "teacher forward" "stage 1" \\
        "teacher LoRA" "stage 2" --kinds plain graph --steps 3 --warm-up 2 --out benchmarks/results/training/NAME.json

For each stage and size (rows x tokens), as the Trainer runs it ("plain"), with the step as a CUDA graph ("graph"), with
MLPs and norms compiled ("compile"), with both, and with layers run again in the backward ("checkpoint", also in a
graph; the teacher's LoRA as transformers does it, stage 2 as the library does): ms a step, tokens a second, share of
the time in which the GPU runs no kernel, kernels a step, peak memory, model-flops use, and the kernels that take
longest. Every kind's losses and gradients are first compared with those of the plain step, where ``--compare`` is not
off. A stage's model is made once for all its rows.

"teacher forward" is the teacher's forward of the same tokens without gradients, with logits of every token, which no
graph is captured of; "teacher LoRA" its own fine-tuning with SDPA, on next tokens, with stage 2's adapters kept in
bfloat16, so that it has no casts. It has every kind that stage 2 has; transformers makes a mask of the whole square
where it is captured, so that SDPA would take a slower kernel, and is kept from it. "stage 2" learns the teacher's
distribution, as the preset says, and so has the teacher's forward in each step; "stage 2 CE" learns next tokens alone,
as that LoRA does.
Peak memory is what is allocated at most, the capture included; of a graph, whose memory stays its own, what is reserved
after its steps where that is more.
Model-flops use (``mfu``): operations that the step needs (``model_flops.py``) over its time, against the 989 TFLOP/s of
a H100's or H200's tensor cores; ``of_product`` is the same against a large product measured in this run. The same
command again goes on where the file ends; no row is begun after ``--seconds``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from host_time import SHAPES
from model_flops import of_a_step
from peft import LoraConfig, get_peft_model
from roofline import product_speed
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lizard_models import LizardConfig, linearize
from lizard_models.distill.compiled import compiled
from lizard_models.distill.graphed import graphed
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.distill.stage2 import LanguageModelling
from lizard_models.distill.trainer import parameter_groups
from lizard_models.files.environment import environment
from lizard_models.model.checkpointing import run_layers_again
from lizard_models.model.layer_configs import lizard_config

SIZES = ((4, 1024), (8, 2048))
KINDS = ("plain", "graph", "compile", "compile+graph", "checkpoint", "checkpoint+graph")
STAGES = ("teacher forward", "stage 1", "teacher LoRA", "stage 2", "stage 2 CE")
COLUMNS = ("ms", "gpu_busy_ms", "kernels", "peak_gib", "mfu", "loss", "relative_gradient")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace
MASKLESS = "sdpa_without_mask"
PRESET = "plain"  # what every row trains, kept keys left out
PEAK = 989.4e12  # operations a second, dense, bfloat16, as NVIDIA's data sheets of both chips have it


def teacher(options: argparse.Namespace) -> LlamaForCausalLM:
    shape = SHAPES[options.shape] | ({} if options.layers is None else {"num_hidden_layers": options.layers})
    config = LlamaConfig(**shape, max_position_embeddings=131072, rope_theta=100000.0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


class NextTokens(nn.Module):
    """The loss of a teacher with adapters on next tokens, as transformers computes it."""

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        given = {"input_ids": input_ids, "labels": input_ids, "attention_mask": attention_mask}
        return {"loss": self.adapted(**given, use_cache=False).loss}


class Forward(nn.Module):
    """The teacher's logits of all tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def objective_of(stage: str, options: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The module the Trainer would train, and its recipe."""
    config = LizardConfig.preset(PRESET)
    model: Any = teacher(options)
    if stage == "teacher forward":
        return Forward(model), None
    recipe: Any = config.stage1 if stage == "stage 1" else config.stage2
    new: dict[str, Any] = {}
    if stage == "stage 2 CE":
        recipe = replace(recipe, cross_entropy_weight=1.0, kl_weight=0.0)
    if stage != "teacher LoRA":
        model = linearize(model, config).requires_grad_(False)
        new = dict(model.stage_parameters())
    if stage == "stage 1":
        model.set_attention_mode("distill", recipe)
        objective: nn.Module = AttentionTransfer(model)
    else:
        adapters = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=list(recipe.lora_targets)
        )
        own = stage == "teacher LoRA"
        adapted = get_peft_model(model, adapters, autocast_adapter_dtype=not own)
        objective = NextTokens(adapted) if own else LanguageModelling(adapted, recipe)
    for parameter in new.values():
        parameter.requires_grad_(True)
    return objective.train(), recipe


def stepper(objective: nn.Module, recipe: Any) -> Callable[[Tensor], Tensor]:
    """One optimizer step, as ``run_stage`` sets it up; a forward alone where there is no recipe."""
    if recipe is None:
        return objective
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = parameter_groups(objective, recipe.learning_rate, getattr(recipe, "gate_learning_rate", None))
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=0.0, fused=parameters[0].is_cuda)

    def step(tokens: Tensor) -> Tensor:
        loss = objective(tokens)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def gradients(objective: nn.Module, tokens: Tensor) -> tuple[float, list[Tensor]]:
    loss = objective(tokens)["loss"]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    return loss.item(), [g.clone() for g in torch.autograd.grad(loss, parameters)]


@contextlib.contextmanager
def stepping(objective: nn.Module, kind: str) -> Iterator[None]:
    """Within: the objective runs in one of the ways of ``KINDS``."""
    captured, again = "graph" in kind, "checkpoint" in kind
    with compiled(objective, "compile" in kind), graphed(objective, captured), without_mask(objective, captured):
        model = language_model(objective)
        if again and isinstance(objective, LanguageModelling):
            run_layers_again(model, captured=captured)  # as stage 2 does
        elif again:
            kept = {"preserve_rng_state": False} if captured else {}
            model.gradient_checkpointing_enable({"use_reentrant": False} | kept)
        try:
            yield
        finally:
            if again:
                model.gradient_checkpointing_disable()


def language_model(objective: nn.Module) -> Any:
    return next(m for m in objective.modules() if isinstance(m, LlamaForCausalLM))


@contextlib.contextmanager
def without_mask(objective: nn.Module, enabled: bool) -> Iterator[None]:
    """Within: a teacher's SDPA has no mask where it is captured, as elsewhere. A name that transformers knows no mask
    for does it."""
    config = language_model(objective).config
    name = config._attn_implementation
    if not enabled or not isinstance(objective, NextTokens) or name != "sdpa":
        yield
        return
    ALL_ATTENTION_FUNCTIONS.register(MASKLESS, ALL_ATTENTION_FUNCTIONS[name])
    config._attn_implementation = MASKLESS
    try:
        yield
    finally:
        config._attn_implementation = name


def difference(plain: list[Any], others: list[Any]) -> dict[str, float]:
    """Largest difference of losses, and of a parameter's gradient against its norm, over the batches."""
    loss = max(abs(a[0] - b[0]) for a, b in zip(plain, others, strict=True))
    worst = max(
        ((x - y).norm() / x.norm().clamp(min=1e-20)).item()
        for a, b in zip(plain, others, strict=True)
        for x, y in zip(a[1], b[1], strict=True)
    )
    return {"loss": loss, "relative_gradient": worst}


def timed(step: Callable[[Tensor], Tensor], batches: list[Tensor], steps: int, warm_up: int) -> dict[str, Any]:
    synchronize = torch.cuda.synchronize if batches[0].is_cuda else lambda: None
    for i in range(warm_up):
        step(batches[i % 2])
    synchronize()
    started = time.perf_counter()
    for i in range(steps):
        step(batches[i % 2])
    synchronize()
    seconds = (time.perf_counter() - started) / steps
    result: dict[str, Any] = {"ms": 1e3 * seconds, "tokens_per_second": batches[0].numel() / seconds}
    if not batches[0].is_cuda:
        return result
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step(batches[0])
        synchronize()
    kernels = kernel_times(trace)
    busy = sum(ms for ms, _ in kernels.values())
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:12]
    return result | {
        "gpu_busy_ms": busy,
        "gpu_idle_share": max(0.0, 1 - busy / result["ms"]),
        "kernels": sum(count for _, count in kernels.values()),
        "top": [[name[:80], round(ms, 3), count] for name, (ms, count) in top],
    }


def kernel_times(trace: Any) -> dict[str, tuple[float, int]]:
    """ms and calls of each kernel, copy and fill by its name. From the trace's file: ``key_averages`` takes a
    millisecond for each."""
    found: dict[str, tuple[float, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    for event in events:
        if event.get("cat") in ON_DEVICE:
            ms, count = found.get(event["name"], (0.0, 0))
            found[event["name"]] = ms + 1e-3 * event["dur"], count + 1
    return found


class Objectives:
    """What is trained in a stage, made anew for another stage and after a row that failed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.stage = options, ""
        self.held: tuple[nn.Module, Any] | None = None

    def of(self, stage: str) -> tuple[nn.Module, Any]:
        if self.held is None or stage != self.stage:
            self.drop()
            self.stage, self.held = stage, objective_of(stage, self.options)
        return self.held

    def drop(self) -> None:
        self.held = None
        gc.collect()


def measure(
    stage: str, kind: str, size: tuple[int, int], options: argparse.Namespace, objectives: Objectives
) -> dict[str, Any]:
    """A row of the report."""
    batch, length = size
    row: dict[str, Any] = {"stage": stage, "batch": batch, "length": length, "kind": kind}
    on_gpu, started = options.device == "cuda", time.perf_counter()
    objective: Any = None
    before: list[Any] = []
    try:
        torch.manual_seed(1)
        torch.compiler.reset()
        vocabulary = SHAPES[options.shape]["vocab_size"]
        batches = [torch.randint(vocabulary, (batch, length), device=options.device) for _ in range(2)]
        objective, recipe = objectives.of(stage)
        config = language_model(objective).config
        attention = None if stage.startswith("teacher") else lizard_config(config).attention
        row["flops"] = of_a_step(stage, objective, config, attention, batch, length)
        if kind not in ("plain", "checkpoint") and recipe is not None and options.compare:
            before = [gradients(objective, tokens) for tokens in batches]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with stepping(objective, kind):
            if before:
                row["difference"] = difference(before, [gradients(objective, tokens) for tokens in batches])
            row |= timed(stepper(objective, recipe), batches, options.steps, options.warm_up)
            if on_gpu:
                held = torch.cuda.memory_reserved() if "graph" in kind else 0
                row["peak_gib"] = max(torch.cuda.max_memory_allocated(), held) / 2**30
        row["mfu"] = row["flops"] / (1e-3 * row["ms"]) / PEAK
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception:
        row["failed"] = traceback.format_exc()
    if objective is not None:
        objective.zero_grad(set_to_none=True)
    objective = before = None
    if "failed" in row:
        objectives.drop()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return row | {"seconds": time.perf_counter() - started}


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(stage, kind, size) of every row, those of a stage together."""
    sizes = [tuple(map(int, s.split("x"))) for s in options.sizes] if options.sizes else SIZES
    for stage, size, kind in itertools.product(options.stages, sizes, options.kinds):
        if is_offered(stage, kind) and not ("graph" in kind and options.device == "cpu"):
            yield stage, kind, size  # type: ignore[misc]


def is_offered(stage: str, kind: str) -> bool:
    """Whether a stage can be run so: no graph of a forward alone, and layers run again where gradients go through."""
    if "graph" in kind and stage == "teacher forward":
        return False
    return "checkpoint" not in kind or stage in STAGES[2:]


def resumed(options: argparse.Namespace) -> dict[str, Any]:
    """The report to go on with. Raises ValueError where the file is of another model."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    report: dict[str, Any] = {"environment": environment(), "arguments": arguments, "rows": []}
    report["command"] = shlex.join(["python", *sys.argv])
    if options.out.is_file():
        kept = json.loads(options.out.read_text())
        if any(kept.get("arguments", {}).get(name) != arguments[name] for name in ("shape", "layers")):
            raise ValueError(f"--out {options.out} is of another model; wanted {options.shape}")
        report["rows"] = kept["rows"]
        if kept.get("command") != report["command"]:
            report["command"] = " && ".join(filter(None, [kept.get("command"), report["command"]]))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=4, help="steps before those that are timed")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--kinds", nargs="*", default=["plain", "graph"], choices=KINDS)
    parser.add_argument("--stages", nargs="*", default=["stage 1", "stage 2"], choices=STAGES)
    parser.add_argument("--sizes", nargs="*", help='such as "4x1024"')
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True, help="with the plain step")
    parser.add_argument("--seconds", type=float, default=480, help="after which no row is begun")
    options = parser.parse_args()
    begun, report = time.perf_counter(), resumed(options)
    if options.device == "cuda":
        report["product_operations_s"] = product_speed()
    done = {(row["stage"], row["kind"], row["batch"], row["length"]) for row in report["rows"]}
    objectives = Objectives(options)
    for stage, kind, size in wanted(options):
        if (stage, kind, *size) in done or time.perf_counter() - begun > options.seconds:
            continue
        row = measure(stage, kind, size, options, objectives)
        if "mfu" in row and options.device == "cuda":
            row["of_product"] = row["mfu"] * PEAK / report["product_operations_s"]
        report["rows"].append(row)
        text = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "top"}
        print(text, flush=True)
        for name, milliseconds, count in row.get("top", []):
            print(f"    {milliseconds:8.3f} ms {count:5d} x {name}")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report["rows"])


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a row, differences from the plain step last."""
    print(f"\n{'':44}" + "".join(f"{name:>14}" for name in COLUMNS))
    for row in rows:
        values = row | row.get("difference", {})
        cells = "".join(f"{values[name]:14.4g}" if name in values else f"{'-':>14}" for name in COLUMNS)
        failed = f"  failed: {row['failed'].strip().splitlines()[-1][:60]}" if "failed" in row else ""
        print(f"{row['stage']:15}  {row['batch']} x {row['length']:<6} {row['kind']:<16}{cells}{failed}")


if __name__ == "__main__":
    main()
