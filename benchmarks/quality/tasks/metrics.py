"""Scores of task requests in a folder of rows, turned into metrics in the rows' files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from benchmarks.quality.bench import write_json
from benchmarks.quality.tasks.recorded_lm import SETS, metrics_of
from benchmarks.quality.tasks.requests import Requests, Scores
from lizard_models.files.sources import Say, silent


def add_task_metrics(
    rows: Path,
    eval_sets: Path,
    tokenizer: PreTrainedTokenizerBase,
    requests: Requests,
    sets: Sequence[str] = SETS,
    limit: int | None = None,
    say: Say = silent,
) -> None:
    """Metrics for every row in the folder that has scores and no metrics of them yet.

    The other arguments as the requests were recorded, see ``recorded_lm.record_requests``.
    """
    waiting = []
    for path in sorted((rows / "scores").glob("*.npz")):
        found = json.loads((rows / f"{path.stem}.json").read_text())["measures"].get("tasks", {})
        if found.get("digest") != requests.digest:
            waiting.append(path)
    measured = metrics_of((Scores.load(path) for path in waiting), eval_sets, tokenizer, requests, sets, limit)
    for path, metrics in zip(waiting, measured, strict=True):
        row = rows / f"{path.stem}.json"
        record = json.loads(row.read_text())
        record["measures"]["tasks"] = {"digest": requests.digest, "metrics": metrics}
        write_json(row, record)
        shown = ", ".join(f"{name} {values.get('acc_norm', values['acc']):.4f}" for name, values in metrics.items())
        say(f"{path.stem}: {shown}")
