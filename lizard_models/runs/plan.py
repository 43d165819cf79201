"""What a run is asked to do, what it gives, and where it works meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from lizard_models.config import LizardConfig
from lizard_models.distill import StageResult
from lizard_models.evaluation import Report
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.teachers.find import Teacher


@dataclass(kw_only=True)
class Plan:
    """What to make of which teacher with which text."""

    teacher: str
    config: LizardConfig
    out: Path
    data: list[str]
    eval_data: list[str] = field(default_factory=list)
    eval_length: int = 2048
    """Positions of an evaluation document."""
    eval_documents: int = 8
    passkey_lengths: list[int] = field(default_factory=list)
    passkey_trials: int = 10
    stage0: bool = True
    """Fit the scores of kept keys; without ``attention.kept_keys`` there is nothing to fit."""
    stage1: bool = True
    stage2: bool = True
    widen: int = 0
    """As many layers get the configuration's ``wide_window`` after stage 1: those that need it most on the training
    text, see ``evaluation.neediest_layers``."""
    state_mib: float | None = None
    """MiB that the state of one sequence may take with float32 keys, in place of ``attention.kept_keys``. After stage 0
    places go to the layers and key heads where they save most on the training text: see ``runs.state_budget``."""
    text_field: str | None = None
    dtype: torch.dtype | None = None
    """Of the teacher's weights; None is the recipe's on a GPU and float32 on a CPU."""
    device: str | None = None
    """"cpu" or "cuda"; None takes CUDA if there is one."""
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    fsdp: bool = False
    """Share the weights among the processes that torchrun or accelerate started."""
    cuda_graph: bool = False
    """Each training step as one CUDA graph: faster for small models, same numbers."""
    compile: bool = False
    """MLPs and norms through torch.compile while training."""
    save_steps: int = 50
    resume: bool = False
    cache: str | None = None


@dataclass
class Outcome:
    """The finished model, where it was saved and what was measured."""

    model: LizardCausalLM
    teacher: Teacher
    folder: Path
    report: Report
    stages: dict[str, StageResult]


def work_folder(out: Path) -> Path:
    """Where a run keeps checkpoints and measurements until the model is finished."""
    return out.with_name(out.name + ".training")


def check_folders(plan: Plan, work: Path) -> None:
    """Raises ValueError unless a run of ``plan`` may write its model, and goes on with a run that there is."""
    if plan.out.exists():
        raise ValueError(f"out: {str(plan.out)!r} exists already; give another folder, or delete it")
    if work.exists() and not plan.resume:
        raise ValueError(f"out: {str(work)!r} holds an unfinished run; go on with resume=True, or delete it")
    if plan.resume and not work.exists():
        raise ValueError(f"resume: there is no unfinished run in {str(work)!r}; leave `resume` out")
    parent = next(p for p in plan.out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise ValueError(f"out: {str(parent)!r} is not a folder")
