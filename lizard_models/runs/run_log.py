"""What ``log.jsonl`` says of a run, stage by stage."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUMBERS = ("loss", "grad_norm", "tokens_per_second", "model_flops_use", "resident_bytes", "cuda_bytes", "seconds")
BY_LAYER = ("memory", "saturated", "linear_share", "error")
RUN = "run"  # stage of the lines that are about the whole


@dataclass
class StageLog:
    """The lines of one stage in their order; after a roll-back or a kill, steps come again."""

    title: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    """With a loss: ``step``, ``NUMBERS`` and ``learning_rates``, where they are numbers."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What happened: ``event``, ``step``, ``time`` and more."""
    readings: list[dict[str, Any]] = field(default_factory=list)
    """Of the converted layers: ``step``, ``layers``, and a list over them for each of ``BY_LAYER``."""

    def latest(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of ``entries`` or ``readings`` those that count: the last one of every step, in the order of steps."""
        return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


@dataclass
class RunLog:
    """A run's log. ``unread``: lines that are cut or no log's. ``stopped``: why it stopped, if that came last."""

    stages: list[StageLog]
    unread: int
    stopped: str


def read_log(path: Path) -> RunLog:
    """The log at ``path``. A line that a kill has cut is left out. Raises ValueError for a file without any line."""
    stages: dict[str, StageLog] = {}
    unread, stopped = 0, ""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = _line(text)
        if line is None:
            unread += bool(text.strip())
            continue
        title, event = line["stage"], line.get("event")
        stopped = str(line.get("why", "")) if event == "stopped" else ""
        if title == RUN:
            continue
        stage = stages.setdefault(title, StageLog(title))
        if event == "attention":
            if _is_reading(line):
                stage.readings.append(line)
            else:
                unread += 1
        elif isinstance(event, str):
            stage.events.append(line)
        elif _number(line.get("loss")):
            rates = line.get("learning_rates")
            kept = {name: line[name] for name in NUMBERS if _number(line.get(name))}
            kept["learning_rates"] = rates if isinstance(rates, list) and all(map(_number, rates)) else []
            stage.entries.append({"step": line["step"], **kept})
        else:
            unread += 1
    if not stages and not stopped:
        raise ValueError(f"report: {str(path)!r} has no line of a run; give the folder of a run")
    return RunLog(list(stages.values()), unread, stopped)


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("stage"), str):
        return None
    step = line.get("step")
    return line if line["stage"] == RUN or (isinstance(step, int) and not isinstance(step, bool)) else None


def _is_reading(line: dict[str, Any]) -> bool:
    layers = line.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, int) for layer in layers):
        return False
    columns = [line.get(name) for name in BY_LAYER]
    if not all(isinstance(column, list) and len(column) == len(layers) for column in columns):
        return False
    memory, saturated, share, error = columns
    return (
        all(isinstance(heads, list) and all(map(_number, heads)) for heads in (*memory, *share))  # type: ignore[misc]
        and all(value is None or _number(value) for value in saturated)  # type: ignore[union-attr]
        and all(map(_number, error))  # type: ignore[arg-type]
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
