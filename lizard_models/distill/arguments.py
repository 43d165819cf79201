"""How and where a training stage runs. What it computes is the recipe's (``Stage1Config``, ``Stage2Config``)."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from lizard_models.distill.parallel import process_count
from lizard_models.model.context import check_layers
from lizard_models.recipes import Recipe


@dataclass(kw_only=True)
class RunArguments:
    """One run of one stage."""

    output_dir: str | Path
    """Folder for checkpoints and logs."""

    resume: bool = False
    """Go on from the newest checkpoint in ``output_dir``."""

    device: str | None = None
    """"cpu" or "cuda"; None takes CUDA if there is one."""

    micro_batch_size: int | None = None
    """Sequences a forward pass on one device; accumulation makes up the recipe's batch. None: no accumulation."""

    save_steps: int = 50
    """Steps between checkpoints."""

    logging_steps: int = 10
    """Steps between entries of the log."""

    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""

    gradient_checkpointing: bool = False
    """Stage 2: recompute layers in the backward pass instead of keeping them."""

    fsdp: bool = False
    """Spread the weights over the processes that torchrun or accelerate started (FSDP-2), for models that do not fit
    on one device. Without it every process holds them all, and only gradients are exchanged."""

    context_parallel: int = 1
    """Stages 1 and 2: processes over which every sequence lies in parts, a divisor of their number, for rows that are
    too long for one device. Groups of them share the batch. With ``fsdp`` or without; see docs/parallel.md."""

    cuda_graph: bool = False
    """Run forward and backward of a step as one CUDA graph: the same numbers with one launch, for models so small that
    launching their kernels takes longer than running them. Not with dropout."""

    compile: bool = False
    """Run MLPs and norms that do not train through torch.compile: fewer kernels, about a minute more at the start."""

    frozen: str | None = None
    """Digest of what does not train, so that a run goes on with the same model alone; None computes it."""

    log: Path | None = None
    """File that gets a line of JSON for every entry of the log and every event; None writes none."""

    report_to: tuple[str, ...] = ()
    """Where transformers' Trainer reports to as well: tensorboard, wandb, and whatever else it knows."""

    diverged: float = 3.0
    """A loss over this times its running median is warned of, then rolled back once at half the rate, then stops the
    stage."""

    log_attention_every: int = 0
    """Steps between readings of gates, linear share and error of every layer, in ``log`` and to ``report_to``; one more
    is made before the first step. 0 makes none. A reading takes a forward of one sequence, and three more of each
    layer's attention."""

    peak_tflops: float | None = None
    """TFLOP/s of one device, against which model-flops use is held; None takes what is known of the device."""

    title: str = "training"
    """What the progress bar calls the run."""


def total_steps(recipe: Recipe, dataset: Dataset) -> int:
    """Optimizer steps of a run. Raises ValueError if epochs are asked of a dataset without a length."""
    if recipe.max_steps is not None:
        return recipe.max_steps
    if not isinstance(dataset, Sized):
        raise ValueError("max_steps must be given: the data are streamed, so an epoch has no known length")
    assert recipe.epochs is not None  # one of the two is set
    return max(1, math.ceil(recipe.epochs * len(dataset) / recipe.batch_size))


def check_reports(names: Sequence[str]) -> None:
    """Raises ValueError for a name that Trainer does not report to, or whose package is missing."""
    there = get_available_reporting_integrations()
    for name in names:
        if name not in there:
            known = ", ".join(there) or "none of those that it knows"
            raise ValueError(
                f"report_to: transformers finds no {name!r} here, only {known}; install it, or leave it out"
            )


def check_context(ranks: int, cuda_graph: bool) -> None:
    """Raises ValueError where the processes do not fall into groups of ``context_parallel``."""
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1 or process_count() % ranks:
        raise ValueError(
            f"context_parallel: got {ranks!r}, wanted a divisor of the number of processes, {process_count()}; start "
            "more with torchrun --nproc-per-node"
        )
    if ranks > 1 and cuda_graph:
        raise ValueError("cuda_graph: a graph holds no exchange between processes; leave out it or context_parallel")


def check_parts(model: Any, recipe: Recipe, ranks: int, softmax: bool) -> None:
    """Raises ValueError where a model cannot read the rows of a stage in parts. softmax: the teacher reads them too."""
    if ranks == 1:
        return
    if recipe.sequence_length % ranks or recipe.sequence_length < 2 * ranks:
        raise ValueError(
            f"context_parallel: {recipe.sequence_length} tokens fall into no {ranks} equal parts; wanted a "
            "sequence_length that is a multiple of it, twice it at least"
        )
    check_layers(model.model, "distill" if softmax else "student")


def check_numbers(run: Any) -> None:
    """Raises ValueError for a factor, an interval or a peak of ``RunArguments``, or of what makes them, that means
    nothing."""
    if not 1 < run.diverged < math.inf:
        raise ValueError(f"diverged: it must be above 1, a factor over the usual loss, got {run.diverged}")
    if run.log_attention_every < 0:
        raise ValueError(f"log_attention_every: it must not be negative, got {run.log_attention_every}")
    if run.peak_tflops is not None and not 0 < run.peak_tflops < math.inf:
        raise ValueError(f"peak_tflops: it must be a positive number of TFLOP/s, got {run.peak_tflops}")


def training_arguments(recipe: Recipe, run: RunArguments, steps: int) -> TrainingArguments:
    """Transformers' arguments for a recipe.

    Raises ValueError if batch_size does not divide into micro batches, for FSDP in a single process, in a graph or
    compiled, and for factors, numbers and reports that mean nothing.
    """
    if run.fsdp and run.cuda_graph:
        raise ValueError("cuda_graph: a graph holds no exchange between processes; leave out one of it and fsdp")
    if run.fsdp and run.compile:
        raise ValueError("compile: sharded layers are not compiled; leave out one of it and fsdp")
    if run.fsdp and process_count() == 1:
        raise ValueError("fsdp: one process has nobody to share with; start it with torchrun --nproc-per-node")
    check_context(run.context_parallel, run.cuda_graph)
    check_reports(run.report_to)
    check_numbers(run)
    devices: dict[str, Any] = {"use_cpu": run.device == "cpu"}
    arguments = TrainingArguments(
        output_dir=str(run.output_dir),
        max_steps=steps,
        save_steps=run.save_steps,
        logging_steps=run.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite must show
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        report_to=list(run.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=run.device != "cpu",
        **devices,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs in one process would be DataParallel; several processes are DDP
    replicas = arguments.world_size // run.context_parallel
    micro = run.micro_batch_size or max(1, recipe.batch_size // replicas)
    accumulate, rest = divmod(recipe.batch_size, micro * replicas)
    if rest:
        raise ValueError(
            f"batch_size={recipe.batch_size} is not a multiple of micro_batch_size={micro} times "
            + f"{arguments.world_size} processes" * (run.context_parallel == 1)
            + f"{replicas} groups of {run.context_parallel} processes" * (run.context_parallel > 1)
        )
    arguments.per_device_train_batch_size = micro
    arguments.gradient_accumulation_steps = accumulate
    return arguments
