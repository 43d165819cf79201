"""What a run is asked to do, what it gives, and where it works meanwhile."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from lizard_models.config import LizardConfig
from lizard_models.distill import StageResult
from lizard_models.distill.arguments import check_numbers
from lizard_models.distill.resume import checkpoints
from lizard_models.evaluation import Report
from lizard_models.files.sources import expanded
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.recipes import Recipe
from lizard_models.runs.start import start_config
from lizard_models.teachers.find import Teacher

LONGEST = 220  # bytes of a name, of 255, to which a run adds those of its own folders
STAGES = ("stage0", "stage1", "stage2", "stage3")
FINE_TUNING = STAGES[2:]


@dataclass(kw_only=True)
class Plan:
    """What to make of which teacher with which text."""

    teacher: str
    """Name on the hub, local folder, or smollm2-135m."""
    config: LizardConfig
    """What to make, and the recipes of the stages."""
    out: Path
    """Folder for the finished model; must not exist yet."""
    data: list[str]
    """Training text: .txt, .json, .jsonl, .parquet or .npy (token ids), folders of these, or data sets of the hub."""
    weights: list[float] = field(default_factory=list)
    """A number for each source of the training text: its share of an epoch's sequences. A source with fewer gives some
    again (stage 0 takes each once), of one with more some are left out. Without weights each gives what it has."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out documents, in the same forms, for the loss by position; none measures none."""
    eval_length: int = 2048
    """Positions of an evaluation document."""
    eval_documents: int = 8
    """Evaluation documents."""
    passkey_lengths: list[int] = field(default_factory=list)
    """Lengths in tokens of passkey tests; none makes none."""
    passkey_trials: int = 10
    """Passkey tests of each length."""
    stage0: bool = True
    """Fit the scores of kept keys; without ``attention.kept_keys`` there is nothing to fit."""
    stage1: bool = True
    """Train the new parameters to imitate the teacher's attention."""
    stage2: bool = True
    """Fine-tune the whole."""
    stage3: bool = False
    """Go on with stage 2 on longer rows, with the recipe of ``stage3``."""
    start: Path | None = None
    """Folder of a model after stage 1, or of the work of a run that has finished it: this plan begins with what stages
    0 and 1 left there, and takes over their recipes."""
    widen: int = 0
    """As many layers get the configuration's ``wide_window`` after stage 1: those that need it most on the training
    text, see ``evaluation.neediest_layers``."""
    state_mib: float | None = None
    """MiB that the state of one sequence may take with float32 keys, in place of ``attention.kept_keys``. After stage 0
    places go to the layers and key heads where they save most on the training text: see ``runs.state_budget``."""
    text_field: str | None = None
    """Field of a record that holds its text; None takes ``text``, or a chat as ``text.documents`` knows them."""
    encoding: str = "utf-8"
    """Of text files and JSON."""
    dtype: torch.dtype | None = None
    """Of the teacher's weights; None is the recipe's on a GPU and float32 on a CPU."""
    device: str | None = None
    """"cpu" or "cuda"; None takes CUDA if there is one."""
    micro_batch_size: int | None = None
    """Sequences that go through at a time: less memory, same result. None takes a process's whole part of a batch."""
    gradient_checkpointing: bool = False
    """Stages 2 and 3 with less memory and a quarter slower."""
    fsdp: bool = False
    """Share the weights among the processes that torchrun or accelerate started."""
    context_parallel: int = 1
    """Processes over which each sequence of stages 1 to 3 lies in parts, for rows too long for one device."""
    cuda_graph: bool = False
    """Each training step as one CUDA graph: faster for small models, same numbers."""
    compile: bool = False
    """MLPs and norms through torch.compile while training."""
    save_steps: int = 50
    """Steps between checkpoints."""
    report_to: tuple[str, ...] = ()
    """Where transformers' Trainer reports to beside ``log.jsonl`` in the model's folder: tensorboard, wandb, ..."""
    diverged: float = 3.0
    """A loss over this times its running median is warned of, then rolled back once at half the rate, then stops the
    run."""
    log_attention_every: int = 0
    """Steps between readings of every converted layer, in ``log.jsonl`` and to ``report_to``: memory of its gates in
    tokens, share of the linear branch, error. 0 makes none."""
    peak_tflops: float | None = None
    """TFLOP/s of one device, against which model-flops use is held; None takes what is known of it (bfloat16 on data
    centre GPUs), and names no use where nothing is."""
    resume: bool | Literal["auto"] = False
    """Go on with the run that ``out`` has begun; "auto": if there is one, else begin it."""
    cache: str | None = None
    """Folder for fetched and converted files; None is $LIZARD_CACHE, else ~/.cache/lizard-attn."""

    def __post_init__(self) -> None:
        self.out = expanded(self.out, "out")
        if self.start is not None:
            if not self.stage2:
                raise ValueError("start: stages 0 and 1 are done there, and stage 2 is left out: nothing is left to do")
            self.start = expanded(self.start, "start")
            self.config = start_config(self.start, self.config)
        if self.stage3 and not self.stage2:
            raise ValueError("stage3: it goes on with what stage 2 trains, and stage 2 is left out; leave out both")
        usable = [w for w in self.weights if math.isfinite(w) and w > 0]
        if self.weights and not len(usable) == len(self.weights) == len(self.data):
            raise ValueError(
                f"weights: got {self.weights}, wanted a positive number for each of {len(self.data)} sources"
            )
        check_numbers(self)
        if self.state_mib is not None and not 0 <= self.state_mib < math.inf:
            raise ValueError(f"state_mib: it must be a number of MiB, got {self.state_mib}")
        if self.out.name in ("", ".."):
            raise ValueError(f"out: got {str(self.out)!r}, wanted the name of a new folder")
        if len(os.fsencode(self.out.name)) > LONGEST:
            raise ValueError(
                f"out: the folder's name has more than {LONGEST} bytes, the most that leaves room for work"
            )

    def stages(self) -> list[str]:
        """The stages that it asks for, as far as there is anything in them to train."""
        return [stage for stage in asked_stages(self) if self.start is None or stage in FINE_TUNING]


@dataclass
class Outcome:
    """The finished model, where it was saved and what was measured."""

    model: LizardCausalLM
    teacher: Teacher
    folder: Path
    report: Report
    stages: dict[str, StageResult]


def asked_stages(plan: Plan) -> list[str]:
    """The stages that a plan does not leave out."""
    return [stage for stage in STAGES if getattr(plan, stage)]


def precision(recipe: Recipe, device: str) -> torch.dtype:
    """Dtype of the teacher's weights: the recipe's on a GPU, float32 on a CPU."""
    return torch.bfloat16 if recipe.precision == "bf16" and device.startswith("cuda") else torch.float32


def work_folder(out: Path) -> Path:
    """Where a run keeps checkpoints and measurements until the model is finished."""
    return out.with_name(out.name + ".training")


def check_folders(plan: Plan, work: Path) -> None:
    """Raises ValueError unless a run of ``plan`` may write its model, and goes on with a run that there is.

    Work in which nothing was trained is no run to go on with.
    """
    if plan.out.exists():
        raise ValueError(f"out: {str(plan.out)!r} exists already; give another folder, or delete it")
    if any(checkpoints(work / stage) for stage in STAGES) and not plan.resume:
        raise ValueError(f"out: {str(work)!r} holds an unfinished run; go on with resume=True, or delete it")
    if plan.resume is True and not work.exists():
        raise ValueError(f"resume: there is no unfinished run in {str(work)!r}; leave `resume` out")
    for source in (*plan.data, *plan.eval_data):
        folder = Path(os.path.realpath(expanded(source, "data")))
        if folder.is_dir() and folder in Path(os.path.realpath(plan.out)).parents:
            raise ValueError(
                f"out: {str(plan.out)!r} lies in {source!r}, which is read as text, and the run would read its own "
                "files; give a folder outside of it"
            )
    parent = next(p for p in (work, *work.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise ValueError(f"out: {str(parent)!r} is not a folder")
