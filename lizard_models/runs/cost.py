"""What a run will take before it is run: shapes, new parameters, memory and time, from a configuration alone."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from lizard_models.config import LizardConfig
from lizard_models.evaluation.neediest_layers import check_widen
from lizard_models.files.folders import check_space
from lizard_models.files.sources import Say
from lizard_models.model.arithmetic import Shape, Stage
from lizard_models.model.layer_configs import converted_layers, head_dim, lizard_config
from lizard_models.model.linearize import student_config
from lizard_models.recipes import Recipe, Stage2Config
from lizard_models.runs.memory import cache_bytes, lizard_bytes
from lizard_models.runs.plan import STAGES, Plan
from lizard_models.runs.state_budget import evenly_kept
from lizard_models.teachers.find import find_teacher

ACHIEVED = 300.0  # TFLOP/s in bf16, of an H100's 989 at most
CPU_ACHIEVED = 0.03  # in float32, of two cores: by the steps of docs/quickstart.md, section 4, of both stages
LONG = 3600.0  # seconds on a CPU from which a run is warned of
EPOCH_TOKENS = 10_000_000  # of the paper's 50,000 examples
LOSS_CHUNK = 512  # positions whose logits exist at a time

_LLAMA3: dict[str, Any] = dict(
    vocab_size=128_256, num_key_value_heads=8, rms_norm_eps=1e-5, bos_token_id=128_000, eos_token_id=128_001
)
_SCALED: dict[str, Any] = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_7B: dict[str, Any] = dict(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32)


def known_shapes() -> dict[str, PreTrainedConfig]:
    """Configurations of teachers that this machine may not reach, as their publishers give them."""
    return {
        "meta-llama/Llama-3.2-1B": LlamaConfig(
            **_LLAMA3,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            head_dim=64,
            max_position_embeddings=131_072,
            rope_parameters=_SCALED,
            tie_word_embeddings=True,
        ),
        "meta-llama/Meta-Llama-3-8B": LlamaConfig(
            **_LLAMA3,
            **_7B,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=False,
        ),
        "mistralai/Mistral-7B-v0.1": MistralConfig(
            **_7B,
            vocab_size=32_000,
            num_key_value_heads=8,
            max_position_embeddings=32_768,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            sliding_window=4096,
            tie_word_embeddings=False,
        ),
    }


@dataclass(frozen=True)
class StageCost:
    """An estimate for one stage: optimizer steps, tokens, arithmetic in FLOP, and bytes at the fullest moment."""

    steps: int
    tokens: int
    flop: float
    bytes: int

    def seconds(self, achieved: float, devices: int = 1) -> float:
        """At ``achieved`` TFLOP/s on each of ``devices``."""
        return self.flop / (achieved * 1e12 * devices)


@dataclass(frozen=True)
class RunCost:
    """What linearizing a teacher takes."""

    parameters: int
    new_parameters: int
    adapters: int
    shapes: dict[str, tuple[int, ...]]  # of the new parameters of one layer
    stage0: StageCost | None  # without kept keys there is none
    stage1: StageCost
    stage2: StageCost
    stage3: StageCost | None = None  # where it is asked for

    def told_on_cpu(self, stages: Collection[str], least: float = 0.0) -> str:
        """What each of ``stages`` takes on two CPU cores, and what takes less; "" below ``least`` seconds in all."""
        seconds = {stage: part.seconds(CPU_ACHIEVED) for stage in sorted(stages) if (part := getattr(self, stage))}
        if sum(seconds.values()) < least:
            return ""
        hours = ", ".join(f"stage {stage[-1]} {time / 3600:,.1f} h" for stage, time in seconds.items())
        less = "a GPU, fewer steps or shorter sequences"
        less += ", or preset plain, which has no stage 0," if "stage0" in seconds else ""
        return f"on a CPU, at {CPU_ACHIEVED:g} TFLOP/s (two cores, float32): {hours}; {less} take less"


def run_cost(
    teacher: PreTrainedConfig,
    lizard: LizardConfig,
    *,
    micro_batch: int | None = None,
    checkpointing: bool = True,
    longer: bool = False,
) -> RunCost:
    """Shapes exactly, from a model without memory; arithmetic and bytes by counting, in bf16 with float32 moments.

    Arithmetic counts matrix products (``Shape.stage_flop``). Bytes: weights, new parameters and adapters with gradient
    and two moments, activations of ``micro_batch`` sequences (default the recipe's batch): of one layer in stages 0 and
    1, of all, or of one and every layer's input with checkpointing, in stages 2 and 3; attention matrices of a block of
    labels; logits of a chunk. longer: count stage 3, too.

    Raises ValueError as the student's configuration does.
    """
    config = student_config(teacher, lizard)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return _run_cost(model, lizard, micro_batch, checkpointing, longer)


def _run_cost(model: Any, lizard: LizardConfig, micro_batch: int | None, checkpointing: bool, longer: bool) -> RunCost:
    """The same of a student that there is."""
    config = model.config
    new = dict(model.lizard_parameters())
    total, added = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in new.values())
    first = model.lizard_attentions()[:1]
    shapes = {name: tuple(p.shape) for one in first for name, p in one.lizard.named_parameters()}
    adapters = tuned_numbers(model, lizard.stage2)
    shape = Shape(config)
    base = total - added
    stages: dict[str, StageCost] = {}
    scores = sum(p.numel() for p in model.key_scores().parameters())
    recipes: dict[str, Recipe] = {"stage1": lizard.stage1, "stage2": lizard.stage2}
    if longer:
        recipes["stage3"] = lizard.stage3.after(lizard.stage2)
    if scores:
        recipes["stage0"] = lizard.stage0
    for name, recipe in recipes.items():
        steps = _steps(recipe)
        tokens = steps * recipe.batch_size * recipe.sequence_length
        rows = (micro_batch or recipe.batch_size) * recipe.sequence_length
        kept = shape.layer_bytes * rows
        kind: Stage = "stage0" if name == "stage0" else "stage1" if name == "stage1" else "stage2"
        flop = shape.stage_flop(kind, recipe, scores, checkpointing)
        if name == "stage0":
            trained, activations = scores, kept + 2 * 4 * rows * config.num_attention_heads * lizard.stage0.label_block
        elif name == "stage1":
            trained, activations = added - scores, kept
        else:
            trained = adapters + (added - scores) * lizard.stage2.train_new_parameters
            activations = kept * (1 if checkpointing else shape.layers)
            activations += 2 * config.hidden_size * rows * shape.layers
            activations += 3 * 4 * LOSS_CHUNK * config.vocab_size
        size = 2 * base + 4 * added + 12 * trained + 4 * adapters * (kind == "stage2") + activations
        stages[name] = StageCost(steps, tokens, flop * tokens, size)
    return RunCost(total, added, adapters, shapes, stages.get("stage0"), stages["stage1"], stages["stage2"],
                   stages.get("stage3"))  # fmt: skip


def check_run(plan: Plan, model: Any, stages: list[str], device: str, say: Say) -> None:
    """Says how long a run takes on a CPU, if that is long. model: the student, of which ``stages`` are run.

    Raises ValueError for a disk that is too small.
    """
    if device == "cpu":
        cost = _run_cost(model, lizard_config(model.config), None, plan.gradient_checkpointing, plan.stage3)
        if told := cost.told_on_cpu(stages, LONG):
            say(f"note: {told}")
    check_space(plan.out, disk_needed(model, plan.config, stages), "the run")


def disk_needed(model: Any, config: LizardConfig, stages: list[str]) -> int:
    """Bytes on disk at the fullest moment of a run: the finished model beside every stage's checkpoints.

    A checkpoint holds the parameters that train and two moments of each, in float32; two are kept, one is written.
    """
    new = sum(p.numel() for _, p in model.stage_parameters())
    tuned = tuned_numbers(model, config.stage2)
    trained = {
        "stage0": sum(p.numel() for p in model.key_scores().parameters()),
        "stage1": new,
        "stage2": tuned + new * config.stage2.train_new_parameters,
    }
    trained["stage3"] = trained["stage2"]
    finished = sum(p.nbytes for p in model.parameters())
    return finished + sum(3 * 4 * 3 * trained[stage] for stage in stages)


def tuned_numbers(model: Any, recipe: Stage2Config) -> int:
    """How many numbers of the projections stage 2 trains: of their adapters, or of their whole weights."""
    shapes = [m.weight.shape for name, m in model.named_modules() if name.rpartition(".")[2] in recipe.lora_targets]
    return sum(shape.numel() if recipe.trained == "full" else recipe.lora_rank * sum(shape) for shape in shapes)


def _steps(recipe: Recipe) -> int:
    if recipe.max_steps is not None:
        return recipe.max_steps
    assert recipe.epochs is not None  # one of the two is set
    tokens = EPOCH_TOKENS if recipe.examples is None else EPOCH_TOKENS * recipe.examples / 50_000
    return math.ceil(recipe.epochs * tokens / (recipe.batch_size * recipe.sequence_length))


def describe_run(
    name: str,
    lizard: LizardConfig,
    *,
    achieved: float = ACHIEVED,
    devices: int = 1,
    micro_batch: int | None = None,
    checkpointing: bool = True,
    widen: int = 0,
    state_mib: float | None = None,
    stages: Collection[str] = STAGES,
    cpu: bool = False,
    cache: str | None = None,
) -> list[str | Table]:
    """What a dry run prints. name: as in ``load_teacher``, or of ``known_shapes`` where the hub is out of reach.

    widen: layers that are to get the wide window, counted as if they had it from the start. state_mib: shared out
    evenly, as it is until the scores are fitted. stages: those that are run. cpu: also what they take without a GPU.
    Raises ValueError for an unknown teacher, and what ``check_widen`` and ``evenly_kept`` do.
    """
    try:
        config = AutoConfig.from_pretrained(find_teacher(name, cache=cache)[0])
    except ValueError:
        if name not in known_shapes():
            raise
        config = known_shapes()[name]
    if state_mib is not None:
        lizard = evenly_kept(config, lizard, state_mib)
    if widen:
        plain = student_config(config, lizard)
        check_widen(plain, widen, lizard.stage1.sequence_length - 1)
        lizard = lizard.replace(wide_layers=converted_layers(plain)[:widen])
    cost = run_cost(config, lizard, micro_batch=micro_batch, checkpointing=checkpointing, longer="stage3" in stages)
    student = student_config(config, lizard)
    lines: list[str | Table] = [
        f"{name}: hidden {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} query "
        f"and {config.num_key_value_heads} key heads of {head_dim(config)}, vocabulary {config.vocab_size:,}",
        f"preset {lizard.name}: {len(converted_layers(student))} layers linearized; {cost.parameters:,} parameters, of "
        f"which {cost.new_parameters:,} are new ({cost.new_parameters / cost.parameters:.2%}); {cost.adapters:,} in "
        "adapters while stage 2 trains",
    ]
    new = Table(title="new parameters of one layer, float32", title_justify="left")
    new.add_column("name", no_wrap=True)
    new.add_column("shape", justify="right")
    for parameter, shape in cost.shapes.items():
        new.add_row(parameter, " x ".join(map(str, shape)) or "1")
    lines.append(new)
    estimate = Table(title=f"estimate at {achieved:g} TFLOP/s on each of {devices} devices", title_justify="left")
    for column in ("stage", "steps", "tokens", "arithmetic", "time", "memory in all"):
        estimate.add_column(column, justify="right")
    for stage in STAGES:
        part: StageCost | None = getattr(cost, stage)
        if part is None or stage not in stages:
            continue
        minutes = part.seconds(achieved, devices) / 60
        sizes = f"{part.flop / 1e15:,.1f} PFLOP", f"{minutes:,.1f} min", f"{part.bytes / 2**30:,.1f} GiB"
        estimate.add_row(stage[-1], f"{part.steps:,}", f"{part.tokens / 1e6:.1f}M", *sizes)
    lines.append(estimate)
    if cpu and stages:
        lines.append(cost.told_on_cpu(stages))
    memory = Table(title="one sequence in bf16 after training", title_justify="left")
    for column in ("tokens", "teacher's cache", "Lizard's state"):
        memory.add_column(column, justify="right")
    for length in (8192, 32_768, 131_072):
        held = cache_bytes(config, length, torch.bfloat16), lizard_bytes(student, length, torch.bfloat16)
        memory.add_row(f"{length:,}", *(f"{size / 2**20:,.1f} MiB" for size in held))
    lines.append(memory)
    return lines
