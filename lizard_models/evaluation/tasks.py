"""Benchmark tasks through lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


def require_tasks(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """lm-eval's task manager. Raises ValueError if lm-eval is missing or does not know a task."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError("tasks: lm-eval is not installed; pip install 'lizard-attn[eval]'") from error
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ValueError(f"tasks: lm-eval knows no {', '.join(unknown)}; see `lm-eval ls tasks`, or give task_files")
    return manager


def run_tasks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    limit: int | None = None,
    include_path: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics of each task, as lm-eval names them, with standard errors.

    tasks: names lm-eval knows, or of task files in the folder ``include_path``. limit: documents a task; None takes
    all. Raises what ``require_tasks`` does.
    """
    manager = require_tasks(tasks, include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
    )
    return {name: dict(values) for name, values in results["results"].items()}
