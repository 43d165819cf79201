"""The plot of a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from lizard_models.evaluation.report import Report

STYLES = {"teacher": ("black", "-"), "window control": ("tab:gray", "--")}
COLOURS = ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown")


def draw(report: Report, path: Path) -> Path:
    """Loss by position, and passkey accuracy by length if there is any, side by side in one PNG."""
    panels = [any(row.loss for row in report.rows), any(row.passkey for row in report.rows)]
    figure = Figure(figsize=(7.2 * sum(panels), 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(1, sum(panels), squeeze=False)[0])
    colours = iter(COLOURS * len(report.rows))
    styles = {row.name: STYLES.get(row.name) or (next(colours), "-") for row in report.rows}
    if panels[0]:
        _loss(report, next(axes), styles)
    if panels[1]:
        _passkey(report, next(axes), styles)
    figure.suptitle(report.title)
    figure.savefig(path)
    return path


def _loss(report: Report, axes, styles: dict[str, tuple[str, str]]) -> None:
    edges: tuple[int, ...] = ()
    for row in report.rows:
        if row.loss is None:
            continue
        edges = row.loss.edges
        colour, line = styles[row.name]
        axes.plot(range(len(edges) - 1), row.loss.means, line, color=colour, marker="o", label=row.name)
    labels = [f"{start}–{end - 1}" for start, end in zip(edges, edges[1:], strict=False)]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("loss (nats, lower is better)")
    axes.set_title("Loss by position")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _passkey(report: Report, axes, styles: dict[str, tuple[str, str]]) -> None:
    lengths = sorted({length for row in report.rows for length in row.passkey})
    rows = [row for row in report.rows if row.passkey]
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        places = [lengths.index(length) + (i - (len(rows) - 1) / 2) * width for length in row.passkey]
        heights = [100 * share for share in row.passkey.values()]
        axes.bar(places, heights, width, color=styles[row.name][0], label=row.name)
    axes.set_xticks(range(len(lengths)), map(str, lengths))
    axes.set_ylim(0, 105)
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel("keys repeated exactly (%)")
    axes.set_title("Passkey retrieval")
    axes.legend(frameon=False)
