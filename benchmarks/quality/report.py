"""The quality part of docs/results.md out of the rows' JSON files: tables, plots, reasons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.quality.goals import goals
from benchmarks.quality.reasons import reasons
from benchmarks.quality.records import read_records
from benchmarks.quality.results import Number, Record, Results, markdown
from benchmarks.quality.tables import TABLES
from lizard_models.evaluation.report import past_edge, short

BEGIN = "<!-- quality: written by `python -m benchmarks.quality docs`, do not edit -->"
END = "<!-- quality ends -->"
PAPER_TABLES = {
    "gates": "Gates (the paper's Table 4, A7)",
    "parts": "Parts left out (the paper's Table 6)",
    "windows": "Window by meta memory, and anchors in its place (the paper's Table 7)",
    "lora": "Adapters: rank and projections (the paper's Table 8)",
    "rates": "How fast and how widely stage 2 trains",
    "weights": "Attention weights compared in stage 1 as well",
    "timescales": "How far back the gates reach, and how widely spread",
    "softmax": "Layers kept softmax (the paper's Table 10)",
    "choices": "What the paper leaves open (A1 to A13)",
    "retrieval": "What may raise recall",
}


def quality_text(folder: Path, figures: Path, link: str) -> str:
    """The whole part. Plots go into ``figures``; ``link`` is what the text calls that folder."""
    parts = [
        "Rows are named as `python -m benchmarks.quality list` names them; each is one JSON file in "
        f"`{folder.as_posix()}`. Loss is in nats. Share: of the gap past 2048 between the window control and the "
        "teacher, both with the row's own stage 2 (the teacher as it is where that stage is distillation), how much is "
        "closed. ± is the standard deviation over seeds."
    ]
    for path in sorted((path for path in folder.glob("*.jsonl") if path.stem != "mqar"), reverse=True):
        results = Results(path)
        if results.records:
            parts.append(_budget_text(results, path.stem, figures, link))
    if text := _mqar_text(folder / "mqar.jsonl", figures, link):
        parts.append(text)
    return "\n\n".join(parts)


def write_docs(document: Path, folder: Path) -> None:
    """Puts the part between its marks in ``document``; appended where there are none."""
    figures = document.parent / "figures"
    figures.mkdir(exist_ok=True)
    text = f"{BEGIN}\n\n{quality_text(folder, figures, 'figures')}\n\n{END}"
    before = document.read_text()
    if BEGIN in before:
        head, _, rest = before.partition(BEGIN)
        _, _, tail = rest.partition(END)
        document.write_text(head + text + tail)
    else:
        document.write_text(f"{before.rstrip()}\n\n## Quality, in rows\n\n{text}\n")


def _budget_text(results: Results, name: str, figures: Path, link: str) -> str:
    from benchmarks.quality import figures as draw

    budget = next(iter(next(iter(results.records.values())).values())).budget
    million = [f"{tokens / 1e6:.1f}M" for tokens in budget.tokens]
    hashes = "; ".join(f"{key} {', '.join(sorted(values))}" for key, values in sorted(results.hashes().items()))
    parts = [
        f"### Budget {name}: {million[0]} tokens of stage 1, {million[1]} of stage 2",
        f"    python -m benchmarks.quality run TABLE --budget {name} --data DATA --eval-data HELD_OUT",
        f"{'; '.join(sorted(results.machines()))}. Data by the start of their sha256: {hashes}.",
    ]
    compared = _compared(results)
    for text in (
        _losses(results, compared),
        draw.losses(results, compared, figures / f"quality-{name}-loss.png", f"{link}/quality-{name}-loss.png"),
        _tasks(results, compared),
        _passkeys(results, compared, "passkey", "Passkey, one key of five digits, by length"),
        _passkeys(results, compared, "passkeys5", "Passkey, five keys of five to eight digits, by length"),
        _length(results, compared),
        draw.length(results, compared, figures / f"quality-{name}-length.png", f"{link}/quality-{name}-length.png"),
        _branches(results, compared),
        _restoration(results),
        draw.restoration(results, figures / f"quality-{name}-layers.png", f"{link}/quality-{name}-layers.png"),
        *(_ablation(results, table, title) for table, title in PAPER_TABLES.items()),
        _wide(results),
        _goals(results),
        _reasons(results),
    ):
        if text:
            parts.append(text)
    return "\n\n".join(parts)


def _compared(results: Results) -> list[str]:
    """Teacher, controls, presets and hybrids, in the order in which they are read."""
    names = list(results.records)
    order = [n for n in names if n.startswith("teacher")] + [n for n in names if n.startswith("control")]
    presets = ["paper_literal", "paper", "lolcats", "liger", "base", "stage2-wide", "recommended"]
    trained = [n for n in names if "-passkeys" in n and not n.startswith(("teacher", "control"))]
    hybrids = [f"{start}softmax-{percent}{end}" for start, end in (("", ""), ("", "-uniform"), ("recommended-", ""))
               for percent in ("12.5", "25", "50")]  # fmt: skip
    wider = [n for n in names if n.startswith(("recommended-longer", "recommended-wide"))]
    return [*order, *(n for n in presets + wider + hybrids + trained if n in results.records)]


def _show(number: Number | None, digits: int = 3, percent: bool = False) -> str:
    return "" if number is None else number.text(digits, percent)


def _bucket(path: tuple[str, ...], index: int) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        loss = record.losses(*path)
        return None if loss is None else loss.means[index]

    return value


def _edges(results: Results, names: list[str], *path: str) -> tuple[int, ...]:
    for name in names:
        for record in results.records[name].values():
            if (loss := record.losses(*path)) is not None:
                return loss.edges
    return ()


def _ranges(edges: tuple[int, ...]) -> list[str]:
    return [f"[{short(a)}, {short(b)})" for a, b in zip(edges, edges[1:], strict=False)]


def _losses(results: Results, names: list[str]) -> str:
    edges = _edges(results, names, "loss")
    rows = []
    for name in names:
        cells = [_show(results.number(name, _bucket(("loss",), i))) for i in range(len(edges) - 1)]
        error = results.number(name, lambda r: r.values.get("after_stage1", {}).get("relative_error"))
        seeds = str(len(results.records[name]))
        rows.append(
            [name, *cells, _show(results.share(name), 0, True), _show(results.kl(name)), _show(error, 4), seeds]
        )
    header = ["", *_ranges(edges), "share", "KL to the teacher", "stage 1 error", "seeds"]
    return "**Loss by position.**\n\n" + markdown(header, rows)


def _tasks(results: Results, names: list[str]) -> str:
    names = [name for name in names if results.has(name, "tasks")]
    if not names:
        return ""
    first = next(iter(results.records[names[0]].values())).values["measures"]["tasks"]["metrics"]
    shown = {
        task: "acc_norm" if "acc_norm" in metrics and task != "arc_easy" else "acc" for task, metrics in first.items()
    }
    rows = []
    for name in names:
        cells = []
        for task, metric in shown.items():
            number = results.number(name, _metric(task, metric))
            error = results.number(name, _metric(task, f"{metric}_stderr"))
            cells.append(_show(number, 1, True) + ("" if error is None else f" (error {100 * error.mean:.1f})"))
        rows.append([name, *cells])
    notes = []
    for task, metrics in first.items():
        text = f"{task} {metrics['documents']} documents"
        text += f", {metrics['ties']} ties" if "ties" in metrics else ""
        text += f", letters {metrics['letters']}" if "letters" in metrics else ""
        notes.append(text)
    return (
        "**Tasks** through lm-eval, 0-shot (MMLU 5-shot), all documents, float32 logits.\n\n"
        + markdown(["", *(f"{task}, {metric}" for task, metric in shown.items())], rows)
        + f"\n\n{names[0]}: {'; '.join(notes)}."
    )


def _metric(task: str, metric: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        return record.values["measures"].get("tasks", {}).get("metrics", {}).get(task, {}).get(metric)

    return value


def _passkeys(results: Results, names: list[str], measure: str, title: str) -> str:
    names = [name for name in names if results.has(name, measure)]
    if not names:
        return ""
    lengths = sorted({int(n) for name in names for r in results.records[name].values()
                      for n in r.values["measures"].get(measure, {})})  # fmt: skip
    rows = [
        [name, *(_show(results.number(name, _found(measure, length)), 0, True) for length in lengths)] for name in names
    ]
    return f"**{title}.**\n\n" + markdown(["", *map(short, lengths)], rows)


def _found(measure: str, length: int) -> Callable[[Record], float | None]:
    return lambda record: record.values["measures"].get(measure, {}).get(str(length))


def _length(results: Results, names: list[str]) -> str:
    names = [name for name in names if results.has(name, "length")]
    if not names:
        return ""
    edges = _edges(results, names, "length")
    rows = [
        [name, *(_show(results.number(name, _bucket(("length",), i))) for i in range(len(edges) - 1))] for name in names
    ]
    return "**Length: loss by position far beyond training.**\n\n" + markdown(["", *_ranges(edges)], rows)


def _branches(results: Results, names: list[str]) -> str:
    names = [name for name in names if results.has(name, "branches")]
    if not names:
        return ""
    rows = []
    for name in names:
        cells = [_show(results.past(name))]
        for branch in ("without_linear", "without_window"):
            cells.append(_show(results.number(name, _past_of("branches", branch))))
        rows.append([name, *cells])
    header = ["", "loss past 2048", "linear branch off", "window off"]
    return "**Each branch switched off.**\n\n" + markdown(header, rows)


def _past_of(*path: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        loss = record.losses(*path)
        edge = None if loss is None else past_edge(loss.edges)
        return None if loss is None or edge is None else loss.past(edge)

    return value


def _restoration(results: Results) -> str:
    records = [results.records.get(name, {}).get(0) for name in ("recommended", "base")]
    measured = next((m for r in records if r is not None and (m := r.values["measures"].get("restore"))), None)
    if not measured:
        return ""
    order = measured["order"]
    best = ", ".join(f"{layer} ({measured['saved'][str(layer)]:.4f})" for layer in order[:8])
    return (
        f"**Which layers to keep softmax.** KL to the teacher after stage 1 {measured['kl']:.4f}; restoring one layer "
        f"saves most at {best}. The rows `softmax-*` keep the first of this order, `-uniform` ones evenly spread "
        "layers."
    )


def _ablation(results: Results, table: str, title: str) -> str:
    order = list(range(30))
    listed = [row.name for row in TABLES[table](order, 30)]
    names = [name for name in listed if results.has(name)]
    if not set(names) - {"base"} - {row.name for row in TABLES["presets"](order, 30)}:
        return ""
    against, rows = listed[0], []
    for name in names:
        past, beside = results.past(name), results.beside(name, against)
        change = "" if beside is None or name == against else f"{beside:+.3f}"
        error = results.number(name, lambda r: r.values.get("after_stage1", {}).get("relative_error"))
        share, kl = _show(results.share(name), 0, True), _show(results.kl(name))
        seeds = str(len(results.records[name]))
        rows.append([name, _show(past), change, share, kl, _show(error, 4), seeds])
    header = ["", "loss past 2048", f"beside {against}", "share", "KL", "stage 1 error", "seeds"]
    return f"**{title}.**\n\n" + markdown(header, rows)


def _wide(results: Results) -> str:
    rows = TABLES["wide"](list(range(30)), 30)
    names = [row.name for row in rows if results.has(row.name)]
    if not any("wide" in name for name in names):
        return ""
    cells = []
    for name in [*names, *(name for name in results.records if name.startswith("control-") and "-wide" in name)]:
        shares = [_show(number(name), 0, True) for number in (results.narrow_share, results.share)]
        cells.append([name, _show(results.past(name)), *shares, _show(results.kl(name))])
    header = ["", "loss past 2048", "share of the gap of a window of 128", "share beside its own control", "KL"]
    return f"**A wider window in a few layers, in constant memory.**\n\n{markdown(header, cells)}"


def _reasons(results: Results) -> str:
    table = reasons(results)
    return (
        "**Why `recommended` is what it is.** Loss of the rows that change a field, minus that of `base` "
        "(`recommended` with the stage 2 and the gate's start it had before; of wide layers, that of "
        "`recommended-longer-x4`, and of their decays, that of `recommended-wide-8x1024-longer-x4`). Positive: "
        "changing the field costs that much. Costlier: more memory, more trained weights, a longer stage 1 or, with "
        f"decays stretched, more loss from 16,384 tokens on with the full budget.\n\n{table}"
        if table
        else ""
    )


def _goals(results: Results) -> str:
    table = goals(results)
    return f"**Goals.**\n\n{table}" if table else ""


def _mqar_text(path: Path, figures: Path, link: str) -> str:
    from benchmarks.quality import figures as draw

    records = [*read_records(path).values()]
    if not records:
        return ""
    kinds: dict[str, list[dict]] = {}
    for record in records:
        kinds.setdefault(record["settings"]["mixer"], []).append(record)
    pairs = list(records[0]["accuracy"])
    rows = []
    for kind, found in kinds.items():
        cells = []
        for n in pairs:
            values = [record["accuracy"][n] for record in found]
            spread = f" ({100 * min(values):.0f} to {100 * max(values):.0f})" if len(values) > 1 else ""
            cells.append(f"{100 * sum(values) / len(values):.1f}%{spread}")
        rows.append([kind, f"{found[0]['memory_bytes']:,}", *cells, str(len(found))])
    settings = records[0]["settings"]
    text = (
        "### Associative recall from scratch\n\n    python -m benchmarks.quality mqar --seeds 0,1,2\n\n"
        f"Two layers of width {settings['width']}, {settings['length']} tokens, {settings['steps']} steps of "
        f"{settings['batch_size']} rows, the better of the rates {', '.join(map(str, settings['learning_rate']))}; "
        "share of questions answered right, by the number of key-value pairs.\n\n"
        + markdown(["mixer", "bytes a layer", *(f"{n} pairs" for n in pairs), "seeds"], rows)
    )
    if {"lizard", "gla"} <= set(kinds):
        by_seed = [
            {record["settings"].get("seed", 0): sum(record["accuracy"].values()) / len(pairs) for record in kinds[kind]}
            for kind in ("lizard", "gla")
        ]
        ours, theirs = (sum(seeds.values()) / len(seeds) for seeds in by_seed)
        both = sorted(by_seed[0].keys() & by_seed[1].keys())
        above = sum(by_seed[0][seed] > by_seed[1][seed] for seed in both)
        beside = "above" if ours > theirs else "not above"
        text += (
            f"\n\nMean accuracy of the hybrid {ours:.1%}, {beside} its linear branch alone ({theirs:.1%}); above it in "
            f"{above} of {len(both)} seeds."
        )
    return f"{text}\n\n{draw.recall(kinds, figures / 'quality-mqar.png', f'{link}/quality-mqar.png')}"
