"""Short training runs on tiny models."""

from __future__ import annotations

import os
import signal

import torch
from tiny import student, tokens
from torch.utils.data import Dataset

from lizard_models.config import LizardConfig
from lizard_models.distill import RunArguments
from lizard_models.model.layer_configs import lizard_config

LENGTH = 48


class Sequences(Dataset):
    """Random sequences. ``stop_at``: a signal, by default Ctrl-C, arrives while that many items have been read."""

    def __init__(self, count: int = 16, stop_at: int | None = None, number: int = signal.SIGINT) -> None:
        self.rows, self.stop_at, self.read, self.number = tokens(count, LENGTH), stop_at, 0, number
        self.digest = "random"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read += 1
        if self.read == self.stop_at:
            os.kill(os.getpid(), self.number)
        return {"input_ids": self.rows[index]}


def recipes(model, steps: int = 6, **changes):
    """The recipes of both stages of a model, shortened."""
    short = {"epochs": None, "max_steps": steps, "batch_size": 2, "sequence_length": LENGTH, **changes}
    config: LizardConfig = lizard_config(model.config).replace(stage1=short, stage2=short)
    return config.stage1, config.stage2


def arguments(folder, **changes) -> RunArguments:
    return RunArguments(output_dir=folder, device="cpu", title="test", logging_steps=1, **changes)


def fresh(preset: str = "plain", **changes):
    """A student as ``linearize`` leaves it."""
    return student(preset, seed=None, **changes)


def snapshot(model) -> dict[str, torch.Tensor]:
    """Copies of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before: dict[str, torch.Tensor], model) -> set[str]:
    """Names of the parameters that are not what they were."""
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
