"""The plots of the quality part. Each function returns Markdown that shows its plot, "" where nothing was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lizard_models.evaluation.report import short
from lizard_models.quality.results import Results
from lizard_models.quality.rows import controls

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
    """Loss by position of the rows."""
    return _curves(results, names, "loss", path, link, "Loss by position")


def length(results: Results, names: list[str], path: Path, link: str) -> str:
    """Loss by position far beyond training."""
    return _curves(results, names, "length", path, link, "Loss far beyond the training length")


def restoration(results: Results, path: Path, link: str) -> str:
    """KL that restoring each layer saves."""
    record = results.records.get("recommended", {}).get(0)
    measured = record.values["measures"].get("restore") if record else None
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


def _curves(results: Results, names: list[str], measure: str, path: Path, link: str, title: str) -> str:
    own = {
        spec.name
        for r in results.records.get("recommended", {}).values()
        for spec in controls(r.spec, r.budget).values()
    }
    shown = [name for name in names if name in own or not name.startswith(("teacher", "control"))]
    names = [name for name in shown if results.has(name, measure)]
    if not names:
        return ""
    figure, axes = _panel()
    colours = iter(COLOURS * len(names))
    lowest, highest = [], []
    for name in names:
        curves = [loss for record in results.records[name].values() if (loss := record.losses(measure)) is not None]
        means = [sum(values) / len(curves) for values in zip(*(curve.means for curve in curves), strict=True)]
        style = {"color": "black"} if name == "teacher" else {"color": next(colours)}
        line = "--" if name.startswith("control") else "-"
        axes.plot(range(len(means)), means, line, marker="o", markersize=3, label=name, **style)
        edges = curves[0].edges
        lowest.append(min(means))
        highest.append(sorted(means)[len(means) // 2])
    labels = [f"{short(a)}–{short(b)}" for a, b in zip(edges, edges[1:], strict=False)]
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    floor = min(lowest)
    axes.set_ylim(floor - 0.1, min(max(highest) + 0.3, floor + 2.0))
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("loss (nats)")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _save(figure, path, link, title)


def _panel() -> tuple[Figure, Any]:
    figure = Figure(figsize=(8.5, 4.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: Path, link: str, what: str) -> str:
    figure.savefig(path, metadata={"Software": None})
    return f"![{what}]({link})"
