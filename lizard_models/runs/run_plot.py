"""The plots of a run's report: one figure a stage."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from statistics import mean, median
from typing import Any

from lizard_models.runs.run_log import StageLog

LEAST = 4  # entries of a log that a curve is drawn through
MARKED = {"resumed": "tab:green", "high": "tab:orange", "rolled back": "tab:red", "diverged": "tab:red"}
PANEL = (5.2, 3.0)  # inches


def draw_stage(stage: StageLog) -> str:
    """A stage's curves as one SVG, the same text whenever it is drawn; empty for a stage with too few entries."""
    if len(stage.entries) < LEAST:
        return ""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = _panels(stage)
    rows = math.ceil(len(panels) / 2)
    height = rows * PANEL[1]
    figure = Figure(figsize=(2 * PANEL[0], height))
    FigureCanvasSVG(figure)
    places = figure.subplots(rows, 2, squeeze=False).flat
    figure.subplots_adjust(0.07, 0.5 / height, 0.98, 1 - 0.7 / height, wspace=0.2, hspace=0.5)
    for axes, (title, draw) in zip(places, panels, strict=False):
        draw(axes)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        for event in stage.events:
            if event["event"] in MARKED:
                axes.axvline(event["step"], color=MARKED[event["event"]], linewidth=0.8, linestyle=":")
    for axes in list(places):
        axes.set_visible(False)
    figure.suptitle(stage.title)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": stage.title, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _panels(stage: StageLog) -> list[tuple[str, Callable[[Any], None]]]:
    entries, readings = stage.entries, stage.latest(stage.readings)

    def curve(name: str, scale: float = 1.0, log: bool = False, zero: bool = False) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            found = [entry.get(name, math.nan) * scale for entry in entries]
            axes.plot(*_with_gaps(entries, found), color="tab:blue", linewidth=1.2)
            if log:
                _logarithmic(axes)
            if zero:
                axes.set_ylim(bottom=0)

        return draw

    def rates(axes: Any) -> None:
        for group in range(max(len(entry["learning_rates"]) for entry in entries)):
            found = [e["learning_rates"][group] if group < len(e["learning_rates"]) else math.nan for e in entries]
            axes.plot(*_with_gaps(entries, found), linewidth=1.2)
        axes.set_ylim(bottom=0)

    def memory(axes: Any) -> None:
        for name, label in (("resident_bytes", "resident"), ("cuda_bytes", "CUDA")):
            if any(name in entry for entry in entries):
                axes.plot(*_with_gaps(entries, [e.get(name, math.nan) / 2**20 for e in entries]), label=label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")

    panels: list[tuple[str, Callable[[Any], None]]] = [("loss", curve("loss", log=True))]
    if any("grad_norm" in entry for entry in entries):
        panels.append(("gradient norm, before clipping", curve("grad_norm", log=True)))
    if any(entry["learning_rates"] for entry in entries):
        panels.append(("learning rates", rates))
    if any("tokens_per_second" in entry for entry in entries):
        panels.append(("tokens per second", curve("tokens_per_second", zero=True)))
    if any("model_flops_use" in entry for entry in entries):
        panels.append(("model-flops use (%)", curve("model_flops_use", 100.0, zero=True)))
    if any("resident_bytes" in entry or "cuda_bytes" in entry for entry in entries):
        panels.append(("memory of the main process (MiB)", memory))
    if len(readings) > 1:
        panels += _layer_panels(readings)
    return panels


def _layer_panels(readings: list[dict[str, Any]]) -> list[tuple[str, Callable[[Any], None]]]:
    """A line a layer, from the first, dark, to the last."""
    kinds = [
        ("relative error of the attention, by layer", "error", lambda value: value, True),
        ("memory of the gates (tokens, median head), by layer", "memory", median, True),
        ("gates above 0.999 (%), by layer", "saturated", lambda value: 100 * value, False),
        ("share of the linear branch (%, mean of heads), by layer", "linear_share", lambda v: 100 * mean(v), False),
    ]

    def panel(name: str, value: Callable[[Any], float], log: bool) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            from matplotlib import colormaps

            layers = readings[-1]["layers"]
            for place, layer in enumerate(layers):
                found = [(r["step"], r[name][place]) for r in readings if r["layers"] == layers]
                kept = [(step, value(each)) for step, each in found if each not in (None, [])]
                colour = colormaps["viridis"](place / max(1, len(layers) - 1))
                axes.plot(
                    [s for s, _ in kept], [v for _, v in kept], color=colour, linewidth=1.0, label=f"layer {layer}"
                )
            if log:
                _logarithmic(axes)
            else:
                axes.set_ylim(-3, 103)
            if len(layers) <= 8:
                axes.legend(frameon=False, fontsize="x-small")

        return draw

    shown = [kind for kind in kinds if any(each not in (None, []) for r in readings for each in r[kind[1]])]
    return [(title, panel(name, value, log)) for title, name, value, log in shown]


def _logarithmic(axes: Any) -> None:
    """A logarithmic axis where nothing is 0, with plain numbers: matplotlib's powers want fonts of their own."""
    values = [y for line in axes.lines for y in line.get_ydata() if not math.isnan(y)]
    if not values or min(values) <= 0:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if max(values) < 10 * min(values) else "")


def _with_gaps(entries: list[dict[str, Any]], found: list[float]) -> tuple[list[float], list[float]]:
    """Steps and values, with a gap where the run went back."""
    steps: list[float] = []
    values: list[float] = []
    for entry, value in zip(entries, found, strict=True):
        if steps and entry["step"] <= steps[-1]:
            steps.append(math.nan)
            values.append(math.nan)
        steps.append(entry["step"])
        values.append(value)
    return steps, values
