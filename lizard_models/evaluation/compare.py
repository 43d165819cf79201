"""A finished model beside its teacher and the window control."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console

from lizard_models.evaluation.control import window_control
from lizard_models.evaluation.passkey import passkey_accuracy
from lizard_models.evaluation.position_loss import loss_by_position
from lizard_models.evaluation.report import CONTROL, TEACHER, Report, Row
from lizard_models.evaluation.tasks import require_tasks, run_tasks
from lizard_models.model.layer_configs import lizard_config
from lizard_models.model.modes import LizardModelMixin
from lizard_models.teachers.find import load_teacher
from lizard_models.teachers.loading import LoadedModel, load_model
from lizard_models.text.sequences import Documents, load_documents


@dataclass(kw_only=True)
class Comparison:
    """What to measure, and on what."""

    model: str
    teacher: str | None = None
    """None takes the one the model records; "none" leaves it out."""
    data: list[str] = field(default_factory=list)
    eval_length: int = 4096
    eval_documents: int = 8
    text_field: str | None = None
    encoding: str = "utf-8"
    passkey_lengths: list[int] = field(default_factory=list)
    passkey_trials: int = 10
    tasks: list[str] = field(default_factory=list)
    task_files: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 1
    positions: str | None = None
    """Of the model in place of its own: "true" or "clamped"."""
    device: str = "cpu"
    dtype: torch.dtype | None = None
    cache: str | None = None


def compare(plan: Comparison, console: Console) -> Report:
    """Measures the model, and its teacher and the untrained window control as far as they are known.

    Raises ValueError for models, data or tasks that are not there.
    """
    if plan.tasks:
        require_tasks(plan.tasks, plan.task_files)  # now, not after an hour of other measurements
    loaded = load_model(plan.model, device=plan.device, dtype=plan.dtype, positions=plan.positions, cache=plan.cache)
    if loaded.tokenizer is None and (plan.passkey_lengths or plan.tasks):
        raise ValueError(f"model {plan.model!r} has no tokenizer, which passkeys and tasks need")
    documents = None
    if plan.data:
        documents = load_documents(
            plan.data,
            loaded.tokenizer,
            plan.eval_length + 1,
            count=plan.eval_documents,
            text_field=plan.text_field,
            encoding=plan.encoding,
            vocab_size=loaded.model.config.vocab_size,
        )
    rows = []
    for name, model in _beside(plan, loaded, console).items():
        with console.status(f"measuring {name}"):
            rows.append(_measure(name, model, plan, loaded, documents))
    settings: dict[str, Any] = {**asdict(plan), "dtype": str(plan.dtype), "training": loaded.training}
    settings["eval_hash"] = documents.digest if documents else None
    return Report(f"evaluation of {plan.model}", rows, settings)


def _beside(plan: Comparison, loaded: LoadedModel, console: Console) -> dict[str, Any]:
    models: dict[str, Any] = {}
    if isinstance(loaded.model, LizardModelMixin):
        name = plan.teacher or loaded.training.get("teacher")
        if name is None:
            console.print("the model records no teacher: give a teacher for the rows to compare with")
        elif name != "none":
            teacher = load_teacher(name, dtype=loaded.model.dtype, device=plan.device, cache=plan.cache)
            models[TEACHER] = teacher.model
            models[CONTROL] = window_control(teacher, lizard_config(loaded.model.config))
    elif plan.teacher not in (None, "none"):
        raise ValueError(f"teacher: {plan.model!r} is not a linearized model, so it has none; leave `teacher` out")
    return {**models, "this model": loaded.model}


def _measure(name: str, model: Any, plan: Comparison, loaded: LoadedModel, documents: Documents | None) -> Row:
    row = Row(name)
    if documents is not None:
        row.loss = loss_by_position(model, documents.tokens, plan.batch_size)
    if plan.passkey_lengths and loaded.tokenizer is not None:
        row.passkey = passkey_accuracy(model, loaded.tokenizer, plan.passkey_lengths, trials=plan.passkey_trials)
    if plan.tasks and loaded.tokenizer is not None:
        row.tasks = run_tasks(
            model,
            loaded.tokenizer,
            plan.tasks,
            batch_size=plan.batch_size,
            num_fewshot=plan.num_fewshot,
            limit=plan.limit,
            include_path=plan.task_files,
        )
    return row
