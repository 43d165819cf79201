"""What memory buys: loss, KL and passkeys against the bytes of a sequence, one line for each way to spend them.

Rows of one budget alone are drawn together, and a line joins rows that differ in nothing but those bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.quality.costs import memory_of
from benchmarks.quality.recall_goals import found_shares
from benchmarks.quality.results import Record, Results, mean_kl, past_loss
from benchmarks.quality.rows import PLAIN, ROWS, TEACHER, Row
from benchmarks.quality.rows.spec import SPACED
from lizard_models.config import LizardConfig

LENGTH = 8192  # tokens of the sequence whose bytes are counted: those of softmax layers grow with it
FAMILIES = {  # in the order of the legend
    "window": ("the newest keys: a wider window", "tab:blue"),
    "wide": ("a wider window in a few layers", "tab:orange"),
    "kept": ("kept keys", "tab:green"),
    "left": ("kept keys, in the sums too", "tab:purple"),
    "shared": ("kept keys, shared out over heads", "tab:brown"),
    "softmax": (f"softmax layers, {LENGTH:,} tokens", "tab:red"),
}
MARKERS, ORACLE = "os^D", "*"  # by the length of the training sequences
TICKS = (5, 10, 20, 40, 80, 160)
GREY = "0.45"
# The same file for the same records: no ids drawn by chance, no date; text stays text, which is smaller than outlines.
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "curve",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
}
METADATA = {"Date": None, "Creator": None}


@dataclass(frozen=True)
class Panel:
    """One part of the figure."""

    title: str
    value: Callable[[Record], float | None]
    limits: tuple[float, float] | None = None


@dataclass
class Line:
    """Rows that differ in their bytes alone."""

    family: str
    length: int
    """Tokens of a training sequence."""
    oracle: bool
    """Its keys are chosen by the text to come: a bound, which no line joins."""
    points: dict[str, float] = field(default_factory=dict)
    """MiB by the row's name."""


def _found(length: int, suffix: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        share = (found_shares(record, "filler", suffix) or {}).get(length)
        return None if share is None else 100 * share

    return value


def panels(results: Results) -> tuple[Panel, ...]:
    """What is drawn. Passkeys with the space before them are all that most rows have, and no figure has both."""
    keys = [len({name for name in results.records if results.number(name, _found(2048, s))}) for s in ("", SPACED)]
    suffix, more = (SPACED, " and the space before it") if keys[1] > keys[0] else ("", "")
    return (
        Panel("loss past 2,048 tokens (nats)", past_loss),
        Panel("KL to the teacher (nats)", mean_kl),
        Panel(f"one passkey{more}, 2,048 tokens (% found)", _found(2048, suffix), (-4, 104)),
        Panel(f"one passkey{more}, 4,096 tokens (% found)", _found(4096, suffix), (-4, 104)),
    )


def family_of(config: LizardConfig) -> str:
    """What a configuration spends its bytes on."""
    if config.softmax_layers:
        return "softmax"
    if config.wide_layers:
        return "wide"
    if config.attention.kept_keys:
        if config.stage0.share_places:
            return "shared"
        return "left" if config.attention.coverage == "left" else "kept"
    return "window"


def curve_lines(results: Results) -> list[Line]:
    """The lines of a budget's rows: ``plain`` and what starts from it and trains on the same text."""
    lines: dict[str, Line] = {}
    for name, records in results.records.items():
        if name not in ROWS or not _drawn(ROWS[name]):
            continue
        record = next(iter(records.values()))
        config, budget = record.config, record.budget
        if config.wide_gate_stretch != 1.0:  # other decays in the same bytes
            continue
        family, length = family_of(config), budget.sequence_length * record.spec.longer
        line = lines.setdefault(_alike(record, family), Line(family, length, record.spec.oracle))
        line.points[name] = memory_of(config, LENGTH)
    order = [*FAMILIES]
    return sorted(lines.values(), key=lambda line: (order.index(line.family), line.length, min(line.points)))


def _drawn(row: Row) -> bool:
    return row.on in (PLAIN, "recommended") and not row.passkeys and not row.without and not row.stage3


def _alike(record: Record, family: str) -> str:
    """The same text for rows that only spend another number of bytes, in the same way."""
    config, row = record.config.to_dict(), record.spec
    for name in ("name", "stage0", "softmax_layers", "softmax_share", "wide_layers", "wide_window"):
        config.pop(name, None)
    kept = bool(config["attention"].pop("kept_keys"))
    if family == "window":
        del config["attention"]["window"]
    if not kept:  # what scores would be is no difference
        config["attention"] = {k: v for k, v in config["attention"].items() if not k.startswith("score_")}
    for stage in ("stage1", "stage2"):
        config[stage].pop("seed", None)
    return json.dumps([family, row.longer, row.oracle, row.widened, config], sort_keys=True, default=str)


def write_curve(results: Results, path: Path) -> bool:
    """Draws the figure of a budget as SVG; False, and no file, where its rows spend bytes in one way alone.

    The bytes of the file follow from the records and the version of matplotlib.
    """
    lines = curve_lines(results)
    if len({line.family for line in lines}) < 2:
        return False
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, panel in zip(figure.subplots(2, 2).flat, panels(results), strict=True):
        _draw(axes, panel, results, lines)
    figure.suptitle(_title(results), fontsize=11)
    figure.legend(handles=_legend(results, lines), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(SETTINGS):
        figure.savefig(path, format="svg", metadata=METADATA)
    return True


def _draw(axes: Any, panel: Panel, results: Results, lines: list[Line]) -> None:
    axes.grid(alpha=0.3)
    for name, colour in ((TEACHER, "black"), (_control(results), GREY)):
        number = results.number(name, panel.value)
        if number is not None:
            axes.axhline(number.mean, color=colour, linestyle="--", linewidth=1)
    lengths = _lengths(lines)
    for line in lines:
        measured = [(mib, number) for name, mib in line.points.items() if (number := results.number(name, panel.value))]
        if not measured:
            continue
        places, numbers = zip(*sorted(measured, key=lambda point: point[0]), strict=True)
        axes.errorbar(
            places,
            [number.mean for number in numbers],
            yerr=[number.spread or 0.0 for number in numbers],
            color=FAMILIES[line.family][1],
            marker=ORACLE if line.oracle else MARKERS[lengths.index(line.length) % len(MARKERS)],
            markersize=9 if line.oracle else 4.5,
            linewidth=0 if line.oracle else 1.4,
        )
    axes.set_title(panel.title, fontsize=10)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.set_xlim(TICKS[0], 1.3 * max(mib for line in lines for mib in line.points.values()))
    axes.set_xlabel("MiB of a sequence, float32", fontsize=9)
    axes.tick_params(labelsize=9)


def _lengths(lines: list[Line]) -> list[int]:
    return sorted({line.length for line in lines if not line.oracle})


def _control(results: Results) -> str:
    """The window control of ``plain``, "" where that was not measured."""
    record = next(iter(results.records.get(PLAIN, {}).values()), None)
    return "" if record is None else record.controls["control"].name


def _title(results: Results) -> str:
    budget = next(iter(next(iter(results.records.values())).values())).budget
    first, second = (f"{tokens / 1e6:.1f}M" for tokens in budget.tokens)
    return f"SmolLM2-135M on novels, budget {budget.name}: {first} tokens of stage 1, {second} of stage 2"


def _legend(results: Results, lines: list[Line]) -> list[Line2D]:
    there = {line.family for line in lines}
    handles = [Line2D([], [], color=colour, label=label) for name, (label, colour) in FAMILIES.items() if name in there]
    dashed: dict[str, Any] = {"linestyle": "--", "linewidth": 1}
    if results.has(TEACHER):
        whole = LizardConfig.preset("window_only", softmax_layers=list(range(30)))
        label = f"the teacher, {memory_of(whole, LENGTH):.0f} MiB at {LENGTH:,} tokens"
        handles.append(Line2D([], [], color="black", label=label, **dashed))
    if results.has(_control(results)):
        label = f"a window of 128 alone, {_control_mib(results):.1f} MiB"
        handles.append(Line2D([], [], color=GREY, label=label, **dashed))
    for length, marker in zip(_lengths(lines), MARKERS, strict=False):
        handles.append(
            Line2D([], [], color=GREY, linestyle="", marker=marker, label=f"trained on {length:,} tokens at a time")
        )
    if any(line.oracle for line in lines):
        label = "kept keys chosen by the text to come"
        handles.append(Line2D([], [], color=GREY, linestyle="", marker=ORACLE, markersize=9, label=label))
    return handles


def _control_mib(results: Results) -> float:
    return memory_of(next(iter(results.records[_control(results)].values())).config, LENGTH)
