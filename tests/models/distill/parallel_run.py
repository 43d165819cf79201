"""One process of several, as torchrun starts it: short runs of all stages; the main one writes what they gave."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import time
from pathlib import Path

import torch
import typer
from training import Sequences, arguments, fresh, recipes

from lizard_models.cli.errors import one_line_errors
from lizard_models.distill import TrainingInterrupted, key_scores, train_stage0, train_stage1, train_stage2
from lizard_models.distill.parallel import is_main_process, sharded, wait_for_all
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.recipes import Stage0Config

torch.set_num_threads(1)
NEVER = 0  # a signal that only asks whether the process is there
KEPT = {"kept_keys": 5, "score_dim": 6, "gate": "scalar"}  # a gate of one row, which one of two processes has


def one_run(
    stage: int,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    stop_at: int | None = None,
    number: int = signal.SIGINT,
    kept: bool = False,
    **changes,
):
    """Losses and parameters after four steps of one stage. kept: of a model that keeps keys, stage 0 of its own."""
    model = fresh(attention=KEPT if kept else {}).to(dtype)
    if stage == 0:
        scores = model.key_scores() if kept else key_scores(model, 8)
        short = Stage0Config(epochs=None, max_steps=4, batch_size=4, sequence_length=48, label_queries=8)
        done = train_stage0(model, scores, Sequences(), arguments(folder, **changes), short)
        return done.losses, {name: p.detach().clone() for name, p in scores.named_parameters()}
    recipe = dataclasses.replace(
        recipes(model, steps=4, batch_size=4)[stage - 1], **({"error": "mse"} if stage == 1 else {})
    )
    run = arguments(folder, **changes)
    if stage == 1:
        result = train_stage1(model, Sequences(stop_at=stop_at, number=number), run, recipe)
    else:
        model, result = train_stage2(model, Sequences(stop_at=stop_at), run, recipe)
    return result.losses, {name: p.detach().clone() for name, p in model.named_parameters()}


def ended(name: str, alone: bool) -> int:
    """Exit code of a command that refuses a file, in the other process alone or in both."""
    wait_for_all()
    try:
        with one_line_errors():
            if not alone or not is_main_process():
                raise ValueError(f"data: {name} is no text")
    except typer.Exit as end:
        return end.exit_code
    return 0


def main(folder: Path) -> None:
    """All ways to train, each into a folder of its own."""
    gc.freeze()  # every Trainer collects; see tests/conftest.py
    found = {}
    for stage in (0, 1, 2):
        for fsdp in (False, True):
            found[f"stage {stage}, {'fsdp' if fsdp else 'ddp'}"] = one_run(
                stage, folder / f"{stage}-{fsdp}", fsdp=fsdp, save_steps=2
            )
    for stage in (0, 1):
        found[f"stage {stage}, kept"] = one_run(stage, folder / f"{stage}-kept", kept=True, fsdp=True)
    for stage in (1, 2):  # every row over both processes
        found[f"stage {stage}, context"] = one_run(stage, folder / f"{stage}-context", context_parallel=2)
    objective = AttentionTransfer(fresh())
    found["held"] = sum(p.to_local().numel() for p in sharded(objective, "cpu").parameters())
    found["whole"] = sum(p.numel() for p in objective.parameters())
    found["bfloat16"] = one_run(1, folder / "bf16", torch.bfloat16, fsdp=True)
    try:  # Ctrl-C reaches one process of two, both stop after the same step
        one_run(1, folder / "stopped", fsdp=True, stop_at=5 if is_main_process() else None)
    except TrainingInterrupted as stopped:
        found["stopped"] = str(stopped)
    found["resumed"] = one_run(1, folder / "stopped", fsdp=True, resume=True)
    found["ended"] = [ended(name, alone) for name, alone in (("nobody.txt", True), ("both.txt", False))]
    began = time.monotonic()
    try:  # the other process is killed in the middle of step 3; this one must not wait for ever
        one_run(
            1,
            folder / "killed",
            fsdp=True,
            save_steps=1,
            stop_at=8,
            number=NEVER if is_main_process() else signal.SIGKILL,
        )
    except Exception as gone:
        found["gone"], found["gone after"] = str(gone), time.monotonic() - began
    if is_main_process():
        torch.save(found, folder / "found.pt")
    os._exit(0)  # nobody is left to take leave of
