"""What the commands' options mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path("benchmarks/results/quality")
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
BudgetName = Annotated[str, typer.Option(help="quick (1.6M and 0.6M tokens) or full (20M a stage).")]


def recorded_lm() -> Any:
    """The module that needs lm-eval. Raises ValueError if it is missing."""
    try:
        from benchmarks.quality.tasks import recorded_lm
    except ImportError as error:
        raise ValueError("tasks: lm-eval is not installed; pip install 'lizard-attn[eval]'") from error
    return recorded_lm


def read_tokenizer(teacher: str, cache: str | None) -> Any:
    """A teacher's tokenizer. Raises ValueError if it has none."""
    from lizard_models.teachers.find import find_teacher, load_tokenizer

    tokenizer = load_tokenizer(find_teacher(teacher, cache=cache)[0])
    if tokenizer is None:
        raise ValueError(f"teacher {teacher!r} has no tokenizer, which tasks need")
    return tokenizer


def read_names(text: str) -> list[str]:
    """Words with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def read_budget(name: str) -> Any:
    """A budget by name. Raises ValueError for others."""
    from benchmarks.quality.rows import BUDGETS

    if name not in BUDGETS:
        raise ValueError(f"--budget is {name!r}, wanted {' or '.join(BUDGETS)}")
    return BUDGETS[name]


def read_seeds(text: str) -> list[int]:
    """Whole numbers from 0 with commas between them. Raises ValueError."""
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise ValueError(f"--seeds is {text!r}, wanted numbers such as 0,1,2")
    return seeds


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
