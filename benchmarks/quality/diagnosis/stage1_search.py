"""Stage 1 with one setting changed at a time: many short runs side by side on one GPU, one JSON file each.

    python -m benchmarks.quality.diagnosis.stage1_search --list list.json --teacher TEACHER --data novels.npy \
        --eval-data validation.npy --out results/ --jobs 10

list.json is a list of {"name": ..., "preset": "plain", "changes": {"attention": {...}, "stage1": {...}},
"seed": 0}, everything but the name optional, "changes" as ``LizardConfig.replace`` takes them. TEACHER is a folder or
``smollm2-135m``; the training data are token ids of any shape, laid end to end, and every run sees the same sequences
in the same order (that of its seed). Besides the list, "teacher" and "window control" are measured. Runs already in
the folder are not repeated, so a search that was cut off goes on; a run that fails leaves its traceback and stops no
other. A table of all that is there is printed at the end, and by itself with --table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SHARED = ("teacher", "window control")


def evaluate(model: Any, tokens: Any, options: argparse.Namespace, errors: bool) -> dict[str, Any]:
    """Loss by position on whole documents, errors of the attention on their first tokens."""
    from lizard_models.evaluation import attention_errors, loss_by_position

    loss = loss_by_position(model, tokens[:, : options.eval_length + 1])
    result: dict[str, Any] = {"loss": {"edges": loss.edges, "means": loss.means, "errors": loss.errors}}
    if errors:
        result["attention"] = {
            str(length): attention_errors(model, tokens[:, :length]).to_dict()
            for length in options.error_lengths
            if length <= options.eval_length
        }
    return result


def train(model: Any, config: Any, tokens: Any, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Stage 1 without checkpoints: the recipe's optimizer, schedule, clip and order of the data."""
    import torch

    from lizard_models.distill.graphed import GraphedForward
    from lizard_models.distill.schedule import cosine_schedule
    from lizard_models.distill.stage1 import AttentionTransfer
    from lizard_models.distill.trainer import parameter_groups
    from lizard_models.text.sequences import PackedTokens

    recipe = config.stage1
    steps = recipe.max_steps
    data = PackedTokens(tokens.reshape(-1), recipe.sequence_length, seed=recipe.seed)
    model.set_attention_mode("distill", recipe)
    for _, parameter in model.stage_parameters():
        parameter.requires_grad_(True)
    parameters = [p for _, p in model.stage_parameters()]
    objective = AttentionTransfer(model).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(objective, recipe.learning_rate, recipe.gate_learning_rate),
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=parameters[0].is_cuda,
    )
    schedule = cosine_schedule(optimizer, steps, recipe.warmup_ratio, recipe.min_learning_rate_ratio)
    device = parameters[0].device
    losses, started = [], time.monotonic()
    forward = GraphedForward(objective) if options.graph else objective
    for step in range(steps):
        rows = [data[(step * recipe.batch_size + i) % len(data)]["input_ids"] for i in range(recipe.batch_size)]
        loss = forward(torch.stack(rows).to(device))["loss"]
        loss.backward()
        if recipe.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step == 9:
            started = time.monotonic()
    curve = torch.stack(losses).tolist()
    result["seconds_per_step"] = (time.monotonic() - started) / max(1, steps - 10)
    result["training_error"] = sum(curve[-max(1, steps // 10) :]) / max(1, steps // 10)
    result["curve"] = [sum(curve[i : i + 20]) / len(curve[i : i + 20]) for i in range(0, steps, 20)]
    model.set_attention_mode("student")
    model.requires_grad_(False).eval()


def work(experiment: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One run: convert, train, measure."""
    import numpy as np
    import torch

    from lizard_models import LizardConfig, linearize
    from lizard_models.evaluation.control import window_control
    from lizard_models.files.environment import environment
    from lizard_models.teachers.find import load_teacher
    from lizard_models.text.sequences import load_documents

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    changes = dict(experiment.get("changes", {}))
    seed = experiment.get("seed", 0)
    size = {"max_steps": options.steps, "epochs": None, "seed": seed}
    config = LizardConfig.preset(experiment.get("preset", "plain"))
    config = config.replace(stage1=size).replace(**changes)
    dtype = torch.bfloat16 if config.stage1.precision == "bf16" and options.device != "cpu" else torch.float32
    teacher = load_teacher(options.teacher, dtype=dtype, device=options.device, cache=None)
    length, vocab_size = options.eval_length + 1, teacher.model.config.vocab_size
    documents = load_documents(
        [options.eval_data], teacher.tokenizer, length, count=options.eval_documents, vocab_size=vocab_size
    )
    result: dict[str, Any] = {**experiment, "config": config.to_dict(), "eval_hash": documents.digest}
    given = sys.argv[1 : sys.argv.index("--one")]
    result["command"] = " ".join(["stage1_search.py", *(Path(word).name if "/" in word else word for word in given)])
    if experiment["name"] == "teacher":
        model: Any = teacher.model
    elif experiment["name"] == "window control":
        model = window_control(teacher, config)
    else:
        torch.manual_seed(seed)
        model = linearize(teacher.model, config).requires_grad_(False)
        if not experiment.get("untrained"):
            train(model, config, np.load(options.data), options, result)
            result["gates"] = gate_summary(model)
    result |= evaluate(model, documents.tokens, options, errors=experiment["name"] not in SHARED)
    if torch.cuda.is_available():
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result | {"seconds": time.monotonic() - started, "environment": environment()}


def gate_summary(model: Any) -> list[list[float]]:
    """The decay where the input says nothing, sigmoid(b), by layer and gate; empty where a gate has no bias."""
    layers = [getattr(getattr(a.lizard, "gate", None), "bias", None) for a in model.lizard_attentions()]
    return [[] if bias is None else [round(b, 5) for b in bias.sigmoid().flatten().tolist()[:16]] for bias in layers]


def file_of(out: Path, name: str) -> Path:
    return out / f"{name.replace(' ', '_').replace('/', '_')}.json"


def write(path: Path, values: dict[str, Any]) -> None:
    """At once: a reader sees the whole file or none."""
    draft = path.with_suffix(f".writing{os.getpid()}")
    draft.write_text(json.dumps(values, indent=1) + "\n")
    draft.replace(path)


def line(result: dict[str, Any], control: float | None) -> str:
    """One run in one line: what the search is judged by."""
    if "failed" in result:
        return f"{result['name']}: FAILED {result['failed'].strip().splitlines()[-1]}"
    means = result["loss"]["means"]
    text = f"{result['name']}: loss " + " ".join(f"{mean:.4f}" for mean in means)
    if control is not None and result["name"] not in SHARED:
        text += f" | below control {control - means[-1]:.4f}"
    for length, errors in result.get("attention", {}).items():
        shown = ("head mean", "head median", "head geometric", "pooled", "output mean", "output pooled")
        known = [(name, errors["readings"][name]) for name in shown if name in errors["readings"]]
        text += f" | T {length} " + " ".join(f"{name} {value:.4f}" for name, value in known)
    if "training_error" in result:
        text += f" | training {result['training_error']:.4f} {result['seconds_per_step']:.3f} s/step"
    return text


def results(out: Path) -> list[dict[str, Any]]:
    """All finished runs of a folder, best loss past 2048 (the last bucket) first."""
    found = [json.loads(path.read_text()) for path in out.glob("*.json")]
    found = [result for result in found if "loss" in result or "failed" in result]
    return sorted(found, key=lambda r: r["loss"]["means"][-1] if "loss" in r else float("inf"))


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """A run without its curve, its errors by head and its configuration where that follows from the changes."""
    kept = {key: value for key, value in result.items() if key not in ("config", "curve", "gates", "attention")}
    if "failed" in kept:
        kept["failed"] = next((x for x in kept["failed"].splitlines()[::-1] if "Error: " in x), kept["failed"])
    for length, errors in result.get("attention", {}).items():
        shown = ("readings", "by_position", "by_layer")
        kept.setdefault("attention", {})[length] = {key: errors[key] for key in shown}
    return kept


def control_loss(out: Path) -> float | None:
    path = file_of(out, SHARED[1])
    values = json.loads(path.read_text()) if path.exists() else {}
    return values["loss"]["means"][-1] if "loss" in values else None


def search(options: argparse.Namespace) -> None:
    """Keeps ``jobs`` processes busy until every run of the list is there."""
    listed = json.loads(options.list.read_text())
    wanted = [{"name": name} for name in SHARED] + listed
    names = [e["name"] for e in wanted]
    if len(set(names)) < len(names):
        raise SystemExit(f"{options.list}: names must differ, {sorted({n for n in names if names.count(n) > 1})}")
    waiting = [e for e in wanted if not file_of(options.out, e["name"]).exists()]
    running: dict[str, subprocess.Popen] = {}
    while waiting or running:
        while waiting and len(running) < options.jobs:
            experiment = waiting.pop(0)
            command = [sys.executable, str(HERE), *sys.argv[1:], "--one", json.dumps(experiment)]
            running[experiment["name"]] = subprocess.Popen(command)
        time.sleep(0.2)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            process = running.pop(name)
            path = file_of(options.out, name)
            if not path.exists():  # killed, out of memory, an aborted kernel
                write(path, {"name": name, "failed": f"the process ended with status {process.returncode}"})
            print(line(json.loads(path.read_text()), control_loss(options.out)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, help="JSON list of runs")
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--data", type=Path, help="token ids to train on, .npy")
    parser.add_argument("--eval-data", help="held-out documents: a file or folder of text or token ids")
    parser.add_argument("--eval-length", type=int, default=4096)
    parser.add_argument("--eval-documents", type=int, default=8)
    parser.add_argument("--error-lengths", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--graph", action="store_true", help="each step as one CUDA graph")
    parser.add_argument("--table", action="store_true", help="print what is in --out and end")
    parser.add_argument("--summary", type=Path, help="also write what is in --out as one JSON file")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one is not None:
        try:
            values = work(options.one, options)
        except Exception:
            values = {**options.one, "failed": traceback.format_exc()}
        write(file_of(options.out, options.one["name"]), values)
        return
    if not options.table:
        search(options)
    print("\nbest last bucket first")
    found = results(options.out)
    for result in found:
        print(line(result, control_loss(options.out)))
    if options.summary is not None:
        write(options.summary, {"runs": [brief(result) for result in found]})


if __name__ == "__main__":
    main()
