"""What an evaluation found: a table for the screen, JSON with all that is needed to repeat it, a plot."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from lizard_models.evaluation.position_loss import PositionLoss, recovered_share
from lizard_models.files.environment import environment, without_nan

TEACHER, CONTROL = "teacher", "window control"


@dataclass
class Row:
    """One model's results."""

    name: str
    loss: PositionLoss | None = None
    passkey: dict[int, float] = field(default_factory=dict)
    relative_error: float | None = None  # of its attention, held out, mean over layers
    attention_errors: dict[str, float] = field(default_factory=dict)  # its readings, see ``AttentionErrors``
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)  # metrics by task, as lm-eval names them

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, perplexities beside losses."""
        values = dataclasses.asdict(self)
        if self.loss is not None:
            values["loss"]["perplexities"] = self.loss.perplexities
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of ``to_dict``."""
        loss = values["loss"]
        if loss is not None:
            loss = PositionLoss(*(tuple(loss[key]) for key in ("edges", "means", "errors")))
        passkey = {int(length): share for length, share in values["passkey"].items()}
        errors = values.get("attention_errors", {})
        return cls(values["name"], loss, passkey, values["relative_error"], errors, values["tasks"])


@dataclass
class Report:
    """Rows in the order in which they are read, and what is needed to get them again."""

    title: str
    rows: list[Row]
    settings: dict[str, Any] = field(default_factory=dict)
    """Teacher, configuration, seeds, hashes of the data, steps."""

    def row(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "title": self.title,
            "settings": self.settings,
            "environment": environment(),
            "rows": [row.to_dict() for row in self.rows],
        }

    def save(self, folder: Path, stem: str = "evaluation") -> Path:
        """Writes STEM.json and returns it; ``plot.save_report`` draws beside it."""
        path = folder / f"{stem}.json"
        path.write_text(json.dumps(without_nan(self.to_dict()), indent=2) + "\n")
        return path

    def tables(self) -> list[Table]:
        """Loss by position, passkey accuracy and tasks, as far as they were measured."""
        tables = (self._loss_table(), self._passkey_table(), self._task_table())
        return [table for table in tables if table is not None]

    def _loss_table(self) -> Table | None:
        rows = [(row, row.loss) for row in self.rows if row.loss is not None]
        if not rows:
            return None
        edges = rows[0][1].edges
        teacher, control = (next((loss for row, loss in rows if row.name == name), None) for name in (TEACHER, CONTROL))
        past = past_edge(edges)
        share = teacher is not None and control is not None and past is not None
        error = any(row.relative_error is not None for row, _ in rows)
        table = Table(title="loss in nats by position", title_justify="left", caption_justify="left", pad_edge=False)
        notes: list[str] = []
        table.add_column("", no_wrap=True)
        for start, end in zip(edges, edges[1:], strict=False):
            table.add_column(f"{short(start)}–{short(end)}", justify="right", no_wrap=True)
        if share:
            table.add_column("share", justify="right")
            notes.append(f"share: of the gap between window control and teacher, how much is closed from {past} on")
        if error:
            table.add_column("error", justify="right")
            notes.append("error: relative squared error of the attention heads, held out")
        table.caption = "\n".join(notes) or None
        for row, loss in rows:
            cells = [row.name, *(f"{mean:.3f}" for mean in loss.means)]
            if share:
                known = row.name not in (TEACHER, CONTROL)
                cells.append(f"{recovered_share(teacher, control, loss, past):.0%}" if known else "")  # type: ignore
            if error:
                cells.append("" if row.relative_error is None else f"{row.relative_error:.4f}")
            table.add_row(*cells)
        return table

    def _passkey_table(self) -> Table | None:
        rows = [row for row in self.rows if row.passkey]
        if not rows:
            return None
        lengths = sorted({length for row in rows for length in row.passkey})
        table = Table(title="passkey found, by length in tokens", title_justify="left")
        table.add_column("", no_wrap=True)
        for length in lengths:
            table.add_column(str(length), justify="right")
        for row in rows:
            table.add_row(row.name, *(f"{row.passkey[n]:.0%}" if n in row.passkey else "" for n in lengths))
        return table

    def _task_table(self) -> Table | None:
        rows = [row for row in self.rows if row.tasks]
        if not rows:
            return None
        table = Table(title="tasks (± standard error)", title_justify="left")
        table.add_column("task")
        table.add_column("metric")
        for row in rows:
            table.add_column(row.name, justify="right")
        for task, metrics in rows[0].tasks.items():
            for metric, value in metrics.items():
                name, _, variant = metric.partition(",")
                if isinstance(value, float) and not name.endswith("_stderr"):
                    error = f"{name}_stderr,{variant}"
                    table.add_row(task, name, *(_with_error(row.tasks[task], metric, error) for row in rows))
        return table


def _with_error(metrics: dict[str, Any], metric: str, error: str) -> str:
    value, spread = metrics[metric], metrics.get(error)
    return f"{value:.4f}" + (f" ± {spread:.4f}" if isinstance(spread, float) else "")


def short(position: int) -> str:
    """A position as 512, 1K, 64K, 2M."""
    if position < 1024 or position % 1024:
        return str(position)
    return f"{position // 1024}K" if position % (1 << 20) else f"{position >> 20}M"


def past_edge(edges: tuple[int, ...]) -> int | None:
    """The position from which "past the window" is counted: 2048, or the last edge before the end below it."""
    inner = [edge for edge in edges[1:-1] if edge <= 2048]
    return inner[-1] if inner else None
