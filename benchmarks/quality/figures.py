"""The plots of the tables. Each function returns Markdown that shows its plot, "" where nothing was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.quality.results import Results
from benchmarks.quality.rows import PLAIN, ROWS, TABLES, TEACHER
from lizard_models.evaluation.report import short

COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
)


def losses(results: Results, names: list[str], path: Path, link: str) -> str:
    """Loss by position of presets, their control and the best hybrids, above the teacher."""
    return _curves(results, names, "loss", path, link, "Loss by position above the teacher", above=True)


def length(results: Results, names: list[str], path: Path, link: str) -> str:
    """Loss by position far beyond training, of the same rows."""
    return _curves(results, names, "length", path, link, "Loss far beyond the training length")


def restoration(results: Results, path: Path, link: str) -> str:
    """KL that restoring each layer saves."""
    measured = results.restoration()
    if not measured:
        return ""
    figure, axes = _panel()
    saved = {int(layer): value for layer, value in measured["saved"].items()}
    axes.bar(list(saved), list(saved.values()), color="tab:blue")
    axes.set_xlabel("layer restored to softmax")
    axes.set_ylabel("KL saved (nats)")
    axes.set_title("What one softmax layer saves")
    return _save(figure, path, link, "KL that restoring each layer saves")


def recall(kinds: dict[str, list[dict[str, Any]]], path: Path, link: str) -> str:
    """Accuracy of associative recall by number of pairs."""
    figure, axes = _panel()
    for (kind, records), colour in zip(kinds.items(), COLOURS, strict=False):
        pairs = list(records[0]["accuracy"])
        means = [100 * sum(r["accuracy"][n] for r in records) / len(records) for n in pairs]
        axes.plot(
            range(len(pairs)), means, marker="o", color=colour, label=f"{kind}, {records[0]['memory_bytes']:,} bytes"
        )
        axes.set_xticks(range(len(pairs)), pairs)
    axes.set_xlabel("key-value pairs")
    axes.set_ylabel("questions answered right (%)")
    axes.set_ylim(-2, 102)
    axes.set_title("Associative recall at equal memory")
    axes.legend(frameon=False)
    return _save(figure, path, link, "Accuracy of associative recall by the number of pairs")


def _drawn(results: Results, names: list[str], measure: str) -> list[str]:
    """Presets, teacher and control of ``recommended`` (of ``plain`` where that is not measured), and of each group of
    hybrids the row that loses least."""
    records = results.records.get("recommended") or results.records.get(PLAIN, {})
    own = {spec.name for record in records.values() for spec in record.controls.values()}
    presets = {row.name for row in TABLES["presets"].rows if row.on == row.name}
    measured = [name for name in names if results.has(name, measure)]
    groups: dict[str, list[str]] = {}
    for name in measured:
        if name in ROWS and (group := ROWS[name].group):
            groups.setdefault(group, []).append(name)
    best = {
        min(group, key=lambda name: past.mean if (past := results.past(name)) else math.inf)
        for group in groups.values()
    }
    return [name for name in measured if name in own | best | (presets - {TEACHER})]


def _curves(
    results: Results, names: list[str], measure: str, path: Path, link: str, title: str, above: bool = False
) -> str:
    """above: as differences from the teacher, to a third above the control; what is higher leaves the plot."""
    curves = {name: _mean_curve(results, name, measure) for name in _drawn(results, names, measure)}
    if not curves:
        return ""
    edges = next(iter(curves.values()))[0]
    teacher = curves[TEACHER][1] if above and TEACHER in curves else None
    figure, axes = _panel()
    colours = iter(COLOURS)
    lowest, highest, bounds = [], [], []
    for name, (_, means) in curves.items():
        if teacher is not None:
            means = [mean - base for mean, base in zip(means, teacher, strict=True)]
        style = {"color": "black"} if name == TEACHER else {"color": next(colours)}
        line = "--" if name.startswith("control") else "-"
        axes.plot(range(len(means)), means, line, marker="o", markersize=3, label=name, **style)
        lowest.append(min(means))
        highest.append(sorted(means)[len(means) // 2])
        if name.startswith("control"):
            bounds.append(max(means))
    labels = [f"{short(a)}–{short(b)}" for a, b in zip(edges, edges[1:], strict=False)]
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    floor = min(lowest)
    if teacher is not None and bounds:
        axes.set_ylim(max(floor, -max(bounds)) - 0.01, 4 / 3 * max(bounds))
    else:
        axes.set_ylim(floor - 0.1, min(max(highest) + 0.3, floor + 2.0))
    for line in axes.get_lines():
        if min(line.get_ydata()) > axes.get_ylim()[1]:
            line.set_label(f"{line.get_label()} (above)")
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("loss minus the teacher's (nats)" if teacher is not None else "loss (nats)")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path, link, title)


def _mean_curve(results: Results, name: str, measure: str) -> tuple[tuple[int, ...], list[float]]:
    found = [loss for record in results.records[name].values() if (loss := record.losses(measure)) is not None]
    means = [sum(values) / len(found) for values in zip(*(loss.means for loss in found), strict=True)]
    return found[0].edges, means


def _panel() -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.5, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path, link: str, what: str) -> str:
    figure.savefig(path, metadata={"Software": None})
    return f"![{what}]({link})"
