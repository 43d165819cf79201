"""A plan carried out for the command line: by ``linearize`` and ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from lizard_models.runs.plan import Plan


def carry_out(plan: Plan, console: Console) -> None:
    """Does what is missing of a plan, and prints what came of it. Raises what ``runs.linearize_run.run`` does."""
    from lizard_models.distill import parallel
    from lizard_models.runs.linearize_run import run
    from lizard_models.runs.work import finished_before

    if finished_before(plan, console.print):
        console.print(f"finished before: {plan.out}   {_try(plan.out)}")
        return
    outcome = run(plan, console)
    for table in outcome.report.tables():
        console.print(table)
    for name, result in outcome.stages.items():
        console.print(f"{name}: {result.steps} steps in {result.seconds:.0f} s, final loss {result.final_loss:.4f}")
    parallel.leave()
    console.print(f"saved: {plan.out}   {_try(plan.out)}")


def describe(plan: Plan, console: Console) -> None:
    """Prints shapes, new parameters, and estimates of memory and time, without weights."""
    from lizard_models.distill import parallel
    from lizard_models.runs.cost import describe_run

    settings: dict[str, Any] = {
        "devices": parallel.process_count(),
        "micro_batch": plan.micro_batch_size,
        "widen": plan.widen,
        "state_mib": plan.state_mib,
        "checkpointing": plan.gradient_checkpointing,
        "longer": plan.stage3,
        "cache": plan.cache,
    }
    for part in describe_run(plan.teacher, plan.config, **settings):
        console.print(part, highlight=False)


def _try(out: Path) -> str:
    return f"try: lizard-attn generate {out} 'Once upon a time'"
