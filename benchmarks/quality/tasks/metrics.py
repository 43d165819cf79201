"""Scores of task requests turned into metrics in the rows' records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.records import change_record, read_records
from benchmarks.quality.tasks.recorded_lm import SETS, metrics_of
from benchmarks.quality.tasks.requests import Requests, Scores
from lizard_models.files.sources import Say, silent


def add_task_metrics(
    results: Path,
    scores: Path,
    eval_sets: Path,
    tokenizer: PreTrainedTokenizerBase,
    requests: Requests,
    sets: Sequence[str] = SETS,
    limit: int | None = None,
    say: Say = silent,
) -> None:
    """Metrics for every row of the file ``results`` that has scores in the folder and no metrics of them yet.

    The other arguments as the requests were recorded, see ``recorded_lm.record_requests``.
    """
    records = read_records(results)
    waiting = []
    for path in sorted(scores.glob("*.npz")):
        if path.stem not in records:
            say(f"{path.stem}: has scores, but no finished record in {results}")
        elif records[path.stem]["measures"].get("tasks", {}).get("digest") != requests.digest:
            waiting.append(path)
    measured = metrics_of((Scores.load(path) for path in waiting), eval_sets, tokenizer, requests, sets, limit)
    for path, metrics in zip(waiting, measured, strict=True):
        added = {"digest": requests.digest, "metrics": metrics}

        def add(record: dict[str, Any], added: dict[str, Any] = added) -> None:
            record["measures"]["tasks"] = added

        change_record(results, path.stem, add)
        shown = ", ".join(f"{name} {values.get('acc_norm', values['acc']):.4f}" for name, values in metrics.items())
        say(f"{path.stem}: {shown}")
