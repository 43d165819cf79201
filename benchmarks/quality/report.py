"""benchmarks/results/TABLES.md out of the rows' records: tables, plots, reasons."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.quality.costs import memory
from benchmarks.quality.goals import goals
from benchmarks.quality.reasons import reasons
from benchmarks.quality.recall_goals import goals_table, keeping_rows, recall_goals
from benchmarks.quality.records import read_records, write_whole
from benchmarks.quality.results import Number, Record, Results, markdown
from benchmarks.quality.rows import ROWS, TABLES, Table, rows_of
from benchmarks.quality.rows.spec import SPACED
from benchmarks.quality.ruler import KINDS
from lizard_models.evaluation.report import past_edge, short

WIDE = "wide"  # the table whose shares are taken against two controls
HEADING = "# Tables of quality"
MQAR_PAIRS = (
    ("lizard", "gla", "the hybrid", "its linear branch alone"),
    ("kept", "lizard", "the hybrid with kept keys", "the hybrid without"),
    ("kept", "kept-fixed", "scores that learn", "those that stay as they start"),
)
NOTE = "Written whole by `python -m benchmarks.quality docs` from the records in [quality/](quality); not to be edited."


def quality_text(folder: Path, figures: Path, link: str) -> str:
    """The whole page. Plots go into ``figures``; ``link`` is what the page calls that folder."""
    parts = [
        HEADING,
        NOTE + " What they say is in [docs/results.md](../../docs/results.md) and "
        "[docs/diary.md](../../docs/diary.md), how they are made in [docs/quality.md](../../docs/quality.md); tables "
        "with rows of options that are retired are kept in [quality/TABLES-0.1.md](quality/TABLES-0.1.md).",
        "Rows are named as `python -m benchmarks.quality list` names them; each is one line of the file of its budget. "
        "Loss is in nats. Share: of the gap past 2048 between the window control and the teacher, both with the row's "
        "own stage 2 (the teacher as it is where that stage is distillation), how much is closed. ± is the standard "
        "deviation over seeds. MiB: one sequence of 4,096 tokens in a model of SmolLM2-135M's shape, keys in "
        "float32; only rows with softmax layers take more for a longer one.",
    ]
    for path in sorted((path for path in folder.glob("*.jsonl") if path.stem != "mqar"), reverse=True):
        results = Results(path)
        if results.records:
            parts.append(_budget_text(results, path.stem, figures, link))
    if text := _mqar_text(folder / "mqar.jsonl", figures, link):
        parts.append(text)
    parts += _recall_goals(folder)
    return "\n\n".join(parts) + "\n"


def write_docs(page: Path, figures: Path, folder: Path) -> None:
    """Writes ``page`` whole and its plots into ``figures``, from the records in ``folder``."""
    figures.mkdir(parents=True, exist_ok=True)
    write_whole(page, quality_text(folder, figures, Path(os.path.relpath(figures, page.parent)).as_posix()))


def _budget_text(results: Results, name: str, figures: Path, link: str) -> str:
    from benchmarks.quality import figures as draw

    budget = next(iter(next(iter(results.records.values())).values())).budget
    million = [f"{tokens / 1e6:.1f}M" for tokens in budget.tokens]
    hashes = "; ".join(f"{key} {', '.join(sorted(values))}" for key, values in sorted(results.hashes().items()))
    parts = [
        f"## Budget {name}: {million[0]} tokens of stage 1, {million[1]} of stage 2",
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
        _passkeys(results, compared, "found", "Passkey in filler, every digit of the answer the likeliest", "filler"),
        _passkeys(results, compared, "found", "Passkey in novels, the same", "novel"),
        *(
            _passkeys(results, compared, measure + SPACED, f"{title}, and the space before it (docs/quality.md)", kind)
            for measure, title, kind in (
                ("passkey", "Passkey, one key", ""),
                ("passkeys5", "Passkey, one of five keys", ""),
                ("found", "Passkey in filler, read once", "filler"),
                ("found", "Passkey in novels, read once", "novel"),
            )
        ),
        *(_passkeys(results, compared, "ruler", f"RULER's tasks, {kind}, by length", kind) for kind in KINDS),
        _passkeys(results, compared, "lines", "The next line of held-out source, by tokens before it"),
        _length(results, compared),
        draw.length(results, compared, figures / f"quality-{name}-length.png", f"{link}/quality-{name}-length.png"),
        _branches(results, compared),
        _curve(results, figures / f"quality-{name}-curve.svg", f"{link}/quality-{name}-curve.svg"),
        _restoration(results),
        draw.restoration(results, figures / f"quality-{name}-layers.png", f"{link}/quality-{name}-layers.png"),
        *(_ablation(results, table) for table in TABLES.values() if table.title and table.name != WIDE),
        _wide(results),
        _goals(results),
        _reasons(results),
    ):
        if text:
            parts.append(text)
    return "\n\n".join(parts)


def _compared(results: Results) -> list[str]:
    """Teacher, controls, and the rows that are compared in every measure, in the order in which they are declared."""
    names = list(results.records)
    controls = [n for start in ("teacher", "control") for n in names if n.startswith(start)]
    return [*controls, *(n for n, row in ROWS.items() if row.compared and n in names and n not in controls)]


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


def _passkeys(results: Results, names: list[str], measure: str, title: str, kind: str = "") -> str:
    """kind: of a measure that has several texts, which of them."""
    names = [name for name in names if results.has(name, measure)]
    if not names:
        return ""
    lengths = sorted({int(n) for name in names for r in results.records[name].values()
                      for n in _shares(r, measure, kind)})  # fmt: skip
    rows = [
        [name, *(_show(results.number(name, _found(measure, length, kind)), 0, True) for length in lengths)]
        for name in names
    ]
    return f"**{title}.**\n\n" + markdown(["", *map(short, lengths)], rows)


def _shares(record: Record, measure: str, kind: str) -> dict[str, float]:
    found = record.values["measures"].get(measure, {})
    return found.get(kind, {}) if kind else found


def _found(measure: str, length: int, kind: str) -> Callable[[Record], float | None]:
    return lambda record: _shares(record, measure, kind).get(str(length))


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


def _curve(results: Results, path: Path, link: str) -> str:
    from benchmarks.quality.curve import write_curve

    if not write_curve(results, path):
        return ""
    return (
        "**What memory buys.** Each line joins rows that differ in their bytes alone; bars are the deviation over "
        f"seeds.\n\n![Loss, KL and passkeys against the bytes of a sequence]({link})"
    )


def _restoration(results: Results) -> str:
    measured = results.restoration()
    if not measured:
        return ""
    order = measured["order"]
    best = ", ".join(f"{layer} ({measured['saved'][str(layer)]:.4f})" for layer in order[:8])
    return (
        f"**Which layers to keep softmax.** KL to the teacher after stage 1 {measured['kl']:.4f}; restoring one layer "
        f"saves most at {best}. The rows `softmax-*` keep the first of this order, `-uniform` ones evenly spread "
        "layers."
    )


def _ablation(results: Results, table: Table) -> str:
    names = [row.name for row in rows_of(table.name) if results.has(row.name)]
    if not {row.name for row in table.rows} & set(names):
        return ""
    rows = []
    scored = any(results.number(name, _fit) for name in names)
    for name in names:
        row = ROWS[name]
        change = results.beside(name, row.reference) if row.reference else None
        beside = "" if change is None else f"{change:+.3f} ({row.reference})"
        error = results.number(name, lambda r: r.values.get("after_stage1", {}).get("relative_error"))
        share, kl = _show(results.share(name), 0, True), _show(results.kl(name))
        cells = [_show(results.past(name)), beside, share, kl, _show(error, 4), f"{memory(name):.1f}"]
        cells += [_show(results.number(name, _fit))] * scored
        rows.append([name, row.about, *cells, str(len(results.records[name]))])
    header = ["", "what it is", "loss past 2048", "beside", "share", "KL", "stage 1 error", "MiB"]
    header += ["R2 of the scores"] * scored + ["seeds"]
    return f"**{table.title}.**\n\n" + markdown(header, rows)


def _fit(record: Record) -> float | None:
    return record.values["stages"].get("stage0", {}).get("r2")


def _wide(results: Results) -> str:
    table = TABLES[WIDE]
    names = [row.name for row in rows_of(table.name) if results.has(row.name)]
    if not any(ROWS[name].wide for name in names):
        return ""
    rows = []
    for name in [*names, *(name for name in results.records if name.startswith("control-") and "-wide" in name)]:
        shares = [_show(number(name), 0, True) for number in (results.narrow_share, results.share)]
        taken = f"{memory(name):.1f}" if name in ROWS else ""
        rows.append([name, _show(results.past(name)), *shares, _show(results.kl(name)), taken])
    header = ["", "loss past 2048", "share of the gap of a window of 128", "share beside its own control", "KL", "MiB"]
    return f"**{table.title}.**\n\n{markdown(header, rows)}"


def _reasons(results: Results) -> str:
    table = reasons(results)
    return (
        "**Why `plain` is what it is**, and so `recommended` but for its kept keys. Loss past 2048 of the rows that "
        "change a field, minus that of the row each stands beside: `base` (`plain` with the stage 2 and the gate's "
        "start that it had before) where no other is named. Positive: changing the field costs that much. Costlier: "
        "more memory, more trained weights or, "
        f"with decays stretched, more loss far away.\n\n{table}"
        if table
        else ""
    )


def _goals(results: Results) -> str:
    table = goals(results)
    return f"**Goals.**\n\n{table}" if table else ""


def _recall_goals(folder: Path) -> list[str]:
    """The goals for exact recall by each budget in which a row with kept keys is measured, the longer one first."""
    parts = []
    for name in ("full", "quick"):
        results = Results(folder / f"{name}.jsonl")
        if any(results.has(name) for name in keeping_rows()):
            table = goals_table(recall_goals(results, folder / "mqar.jsonl"))
            parts.append(f"**Budget {name}.**\n\n    python -m benchmarks.quality goals --budget {name}\n\n{table}")
    if not parts:
        return []
    return [
        "## Goals for exact recall\n\nThey are for the budget `full`, and for one row: of those with kept keys that "
        "which loses least past 2048 tokens in at most 40 MiB (20 MiB where that is the goal). A mean is held against "
        "a goal, but for recall from scratch, where every seed is.",
        *parts,
    ]


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
        "## Associative recall from scratch\n\n    python -m benchmarks.quality mqar --seeds 0,1,2\n\n"
        f"Two layers of width {settings['width']}, {settings['length']} tokens, {settings['steps']} steps of "
        f"{settings['batch_size']} rows, the better of the rates {', '.join(map(str, settings['learning_rate']))}; "
        "share of questions answered right, by the number of key-value pairs.\n\n"
        + markdown(["mixer", "bytes a layer", *(f"{n} pairs" for n in pairs), "seeds"], rows)
    )
    for ours, theirs, name, other in MQAR_PAIRS:
        if {ours, theirs} <= set(kinds):
            text += f"\n\n{_mqar_beside(kinds[ours], kinds[theirs], name, other)}"
    for kind, found in kinds.items():
        if all("values_kept" in record for record in found):
            shares = (sum(record["values_kept"][n] for record in found) / len(found) for n in pairs)
            shown = ", ".join(f"{n} pairs {share:.0%}" for n, share in zip(pairs, shares, strict=True))
            text += f"\n\n`{kind}`: values that are a kept key of any head at the row's end: {shown}."
    return f"{text}\n\n{draw.recall(kinds, figures / 'quality-mqar.png', f'{link}/quality-mqar.png')}"


def _mqar_beside(ours: list[dict], theirs: list[dict], name: str, other: str) -> str:
    """Which of two mixers answers more, in the mean and seed by seed."""
    by_seed = [
        {r["settings"].get("seed", 0): sum(r["accuracy"].values()) / len(r["accuracy"]) for r in records}
        for records in (ours, theirs)
    ]
    first, second = (sum(means.values()) / len(means) for means in by_seed)
    both = sorted(by_seed[0].keys() & by_seed[1].keys())
    above = sum(by_seed[0][seed] > by_seed[1][seed] for seed in both)
    beside, seeds = "above" if first > second else "not above", f"above it in {above} of {len(both)} seeds."
    return f"Mean accuracy of {name} {first:.1%}, {beside} {other} ({second:.1%}); {seeds}"
