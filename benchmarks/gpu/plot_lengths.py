"""Draw the files of lengths.py: tokens a second and memory by the length of the text, as the paper's Figure 4.

    python benchmarks/gpu/plot_lengths.py benchmarks/results/decode/NAME.json --out docs/figures/NAME.svg

A cross stands where memory ran out, at the memory that was counted for it. Needs matplotlib (the extra ``demo``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

LINES = {  # by way: label, colour
    "teacher": ("teacher", "tab:gray"),
    "teacher-static": ("teacher, static cache, compiled", "black"),
    "lizard": ("Lizard", "tab:green"),
}
PANELS = (("tokens_s", "tokens a second, generated"), ("peak_gib", "most memory while generating, GiB"))


def shown(length: float) -> str:
    """4096 as 4K, 2**20 as 1M."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if length >= size:
            return f"{length / size:.4g}{letter}"
    return f"{length:.4g}"


def rows_of(files: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each way by length; of a length in several files that of the last."""
    found: dict[str, dict[int, dict[str, Any]]] = {way: {} for way in LINES}
    for row in (row for file in files for row in file["rows"]):
        found[row["way"]][row["length"]] = row
    return {way: [rows[n] for n in sorted(rows)] for way, rows in found.items() if rows}


def draw(files: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    by_way, arguments = rows_of(files), files[0]["arguments"]
    lengths = sorted({row["length"] for rows in by_way.values() for row in rows})
    for panel, (key, label) in zip(panels, PANELS, strict=True):
        for way, rows in by_way.items():
            name, colour = LINES[way]
            points = [(row["length"], row[key]) for row in rows if row.get(key) is not None and "failed" not in row]
            panel.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4) if points else None
            out = [row for row in rows if row.get("failed") == "out of memory"]
            heights = [row["counted_gib"] if key == "peak_gib" else 0 for row in out if "counted_gib" in row]
            if heights:
                at = [row["length"] for row in out if "counted_gib" in row]
                panel.plot(at, heights, "x", color=colour, label=f"{name}: out of memory", markersize=9)
        if key == "peak_gib" and "memory_gib" in files[0]:
            panel.axhline(files[0]["memory_gib"], linestyle=":", color="tab:gray", label="the GPU's memory")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(lengths))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: shown(x)))
        panel.set_ylim(bottom=0)
        panel.set(xlabel="tokens of text before", ylabel=label)
        panel.grid(alpha=0.3)
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    device = files[0]["environment"]["device"]
    figure.suptitle(f"{arguments['shape']}, batch {arguments['batch']}, random weights, {device}", fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="of one shape and batch")
    parser.add_argument("--out", type=Path, required=True, help="SVG file to write")
    options = parser.parse_args()
    files = [json.loads(path.read_text()) for path in options.files]
    if len({(file["arguments"]["shape"], file["arguments"]["batch"]) for file in files}) > 1:
        raise ValueError("files: of several shapes or batches, wanted one of each")
    matplotlib.rcParams["svg.hashsalt"] = "lengths"  # the same bytes from the same figures
    options.out.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasSVG(draw(files)).print_svg(options.out, metadata={"Date": None})
    print(f"{options.out}: {sum(len(file['rows']) for file in files)} rows")


if __name__ == "__main__":
    main()
