"""Reports on disk with their plots: JSON and, where matplotlib is installed, a PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lizard_models.evaluation.report import Report, short
from lizard_models.evaluation.stream import StreamReport
from lizard_models.files.sources import Say, silent

STYLES = {"teacher": ("black", "-"), "window control": ("tab:gray", "--")}
COLOURS = ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple", "tab:brown")


def save_report(report: Report, folder: Path, stem: str = "evaluation", say: Say = silent) -> list[Path]:
    """Writes STEM.json and, if there is a curve to draw, STEM.png. Returns the files.

    Without matplotlib there is no plot, and ``say`` hears of it.
    """
    written = [report.save(folder, stem)]
    if any(row.loss or row.passkey for row in report.rows):
        written += _drawn(lambda: draw(report, folder / f"{stem}.png"), say)
    return written


def save_stream(report: StreamReport, folder: Path, stem: str = "stream", say: Say = silent) -> list[Path]:
    """Writes STEM.json and, as ``save_report`` does, STEM.png. Returns the files."""
    return [report.save(folder, stem), *_drawn(lambda: draw_stream(report, folder / f"{stem}.png"), say)]


def _drawn(draw: Callable[[], Path], say: Say) -> list[Path]:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        say("no plot is drawn, matplotlib is missing: pip install 'lizard-attn[demo]'")
        return []
    return [draw()]


def _figure(width: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(report: Report, path: Path) -> Path:
    """Loss by position, and passkey accuracy by length if there is any, side by side in one PNG."""
    panels = [any(row.loss for row in report.rows), any(row.passkey for row in report.rows)]
    figure = _figure(7.2 * sum(panels))
    axes = iter(figure.subplots(1, sum(panels), squeeze=False)[0])
    colours = iter(COLOURS * len(report.rows))
    styles = {row.name: STYLES.get(row.name) or (next(colours), "-") for row in report.rows}
    if panels[0]:
        _loss(report, next(axes), styles)
    if panels[1]:
        _passkey(report, next(axes), styles)
    named = [panel.get_legend_handles_labels() for panel in reversed(figure.axes)]
    shown = {label: handle for handles, labels in named for handle, label in zip(handles, labels, strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(5, len(shown)), frameon=False)
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
    labels = [f"{short(start)}–{short(end)}" for start, end in zip(edges, edges[1:], strict=False)]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("loss (nats, lower is better)")
    axes.set_title("Loss by position")
    axes.grid(alpha=0.3)


def _passkey(report: Report, axes, styles: dict[str, tuple[str, str]]) -> None:
    lengths = sorted({length for row in report.rows for length in row.passkey})
    rows = [row for row in report.rows if row.passkey]
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        places = [lengths.index(length) + (i - (len(rows) - 1) / 2) * width for length in row.passkey]
        heights = [100 * share for share in row.passkey.values()]
        bars = axes.bar(places, heights, width, color=styles[row.name][0], label=row.name)
        axes.bar_label(bars, fmt="%.0f", fontsize="small")  # a bar of 0% has no height to see
    axes.set_xticks(range(len(lengths)), map(str, lengths))
    axes.set_ylim(0, 110)
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel("keys repeated exactly (%)")
    axes.set_title("Passkey retrieval")


def draw_stream(report: StreamReport, path: Path) -> Path:
    """Loss by bucket of positions and memory along the stream, side by side in one PNG."""
    figure = _figure(14.4)
    loss, memory = figure.subplots(1, 2)
    edges, means = report.loss.edges, report.loss.means
    loss.stairs(means, [max(edge, 64) for edge in edges], baseline=None, color="tab:blue", linewidth=2)
    loss.plot([s.tokens for s in report.samples], [s.loss for s in report.samples], ".", color="tab:blue", alpha=0.25)
    loss.set_xscale("log", base=2)
    loss.set_ylabel("loss (nats, lower is better)")
    loss.set_title("Loss by position: buckets, and single chunks")
    for name, of, colour in (("resident", "resident", "tab:orange"), ("CUDA", "cuda", "tab:green")):
        if any(getattr(s, of) for s in report.samples):
            sizes = [getattr(s, of) / 2**20 for s in report.samples]
            memory.plot([s.tokens for s in report.samples], sizes, color=colour, label=name)
    memory.set_ylim(bottom=0)
    memory.set_ylabel("MiB")
    memory.set_title("Memory")
    memory.legend(frameon=False)
    for axes in (loss, memory):
        axes.set_xlabel("position in the text (tokens)")
        axes.grid(alpha=0.3)
    figure.suptitle(report.title)
    figure.savefig(path)
    return path
