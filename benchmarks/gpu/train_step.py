"""Where the time of a training step goes: stage 1 and stage 2 of a model of SmolLM2-135M's shape, random weights.

    python benchmarks/gpu/train_step.py --out benchmarks/results/training/NAME.json

For each stage and size (rows x tokens), as the Trainer runs it ("plain"), with the step as a CUDA graph ("graph"), with
MLPs and norms compiled ("compile"), and with both: ms a step, tokens a second, share of the time in which the GPU runs
no kernel, kernels a step, peak memory, and the kernels that take longest. Every way's losses and gradients are first
compared with those of the plain step. Under three minutes for one size.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, linearize
from lizard_models.distill.compiled import compiled
from lizard_models.distill.graphed import graphed
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.distill.stage2 import LanguageModelling
from lizard_models.distill.trainer import parameter_groups
from lizard_models.files.environment import environment

SIZES = ((4, 1024), (8, 2048))
KINDS = ("plain", "graph", "compile", "compile+graph")
COLUMNS = ("ms", "gpu_busy_ms", "kernels", "peak_gib", "loss", "relative_gradient")


def teacher(device: str, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval().requires_grad_(False)


def objective_of(stage: str, device: str, layers: int) -> tuple[nn.Module, Any]:
    """The module the Trainer would train, and its recipe."""
    config = LizardConfig.preset("recommended")
    student = linearize(teacher(device, layers), config).requires_grad_(False)
    new = dict(student.stage_parameters())
    if stage == "stage 1":
        student.set_attention_mode("distill", config.stage1)
        objective: nn.Module = AttentionTransfer(student)
        recipe: Any = config.stage1
    else:
        recipe = config.stage2
        adapters = LoraConfig(
            r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, target_modules=list(recipe.lora_targets)
        )
        objective = LanguageModelling(get_peft_model(student, adapters), recipe)
    for parameter in new.values():
        parameter.requires_grad_(True)
    return objective.train(), recipe


def stepper(objective: nn.Module, recipe: Any) -> Callable[[Tensor], Tensor]:
    """One optimizer step, as ``run_stage`` sets it up."""
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
    with compiled(objective, "compile" in kind), graphed(objective, "graph" in kind):
        yield


def difference(plain: list[Any], others: list[Any]) -> dict[str, float]:
    """Largest difference of losses, and of a parameter's gradient against its norm, over the batches."""
    loss = max(abs(a[0] - b[0]) for a, b in zip(plain, others, strict=True))
    worst = max(
        ((x - y).norm() / x.norm().clamp(min=1e-20)).item()
        for a, b in zip(plain, others, strict=True)
        for x, y in zip(a[1], b[1], strict=True)
    )
    return {"loss": loss, "relative_gradient": worst}


def timed(step: Callable[[Tensor], Tensor], batches: list[Tensor], steps: int) -> dict[str, Any]:
    synchronize = torch.cuda.synchronize if batches[0].is_cuda else lambda: None
    for i in range(4):
        step(batches[i % 2])
    synchronize()
    if batches[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for i in range(steps):
        step(batches[i % 2])
    synchronize()
    seconds = (time.perf_counter() - started) / steps
    result: dict[str, Any] = {"ms": 1e3 * seconds, "tokens_per_second": batches[0].numel() / seconds}
    if not batches[0].is_cuda:
        return result
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for i in range(2):
            step(batches[i % 2])
        synchronize()
    kernels = [e for e in trace.key_averages() if e.self_device_time_total > 0]
    busy = sum(e.self_device_time_total for e in kernels) / 2e3  # ms a step
    top = sorted(kernels, key=lambda e: -e.self_device_time_total)[:12]
    return result | {
        "gpu_busy_ms": busy,
        "gpu_idle_share": max(0.0, 1 - busy / result["ms"]),
        "kernels": sum(e.count for e in kernels) // 2,
        "top": [[e.key[:80], round(e.self_device_time_total / 2e3, 3), e.count // 2] for e in top],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--kinds", nargs="*", default=["plain", "graph"], choices=KINDS)
    parser.add_argument("--sizes", nargs="*", help='such as "4x1024"')
    options = parser.parse_args()
    sizes = [tuple(map(int, s.split("x"))) for s in options.sizes] if options.sizes else SIZES
    rows: list[dict[str, Any]] = []
    kinds = [kind for kind in options.kinds if options.device != "cpu" or "graph" not in kind]
    for kind, stage, (batch, length) in itertools.product(kinds, ("stage 1", "stage 2"), sizes):
        row: dict[str, Any] = {"stage": stage, "batch": batch, "length": length, "kind": kind}
        objective: Any = None
        try:
            torch.manual_seed(1)
            torch.compiler.reset()
            batches = [torch.randint(49152, (batch, length), device=options.device) for _ in range(2)]
            objective, recipe = objective_of(stage, options.device, options.layers)
            plain = [] if kind == "plain" else [gradients(objective, tokens) for tokens in batches]
            with stepping(objective, kind):
                if plain:
                    row["difference"] = difference(plain, [gradients(objective, tokens) for tokens in batches])
                row |= timed(stepper(objective, recipe), batches, options.steps)
        except Exception:
            row["failed"] = traceback.format_exc()
        objective = plain = None
        gc.collect()
        rows.append(row)
        text = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items() if k != "top"}
        print(text, flush=True)
        for name, milliseconds, count in row.get("top", []):
            print(f"    {milliseconds:8.3f} ms {count:5d} x {name}")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    print_table(rows)


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a row, differences from the plain step last."""
    print(f"\n{'':36}" + "".join(f"{name:>18}" for name in COLUMNS))
    for row in rows:
        values = row | row.get("difference", {})
        cells = "".join(f"{values[name]:18.4g}" if name in values else f"{'-':>18}" for name in COLUMNS)
        failed = "  failed" if "failed" in row else ""
        print(f"{row['stage']}  {row['batch']} x {row['length']:<6} {row['kind']:<18}{cells}{failed}")


if __name__ == "__main__":
    main()
