"""The paper's tables in its own form, what our rows show beside what it says, teacher by teacher.

The paper's teachers are Llama-3-8B and Mistral-7B; ours are those of ``teachers``, so that shares of a teacher are
what compares. A cell without a record says so.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.records import write_whole
from benchmarks.quality.results import Number, Record, Results, markdown
from benchmarks.quality.rows import BUDGETS, ROWS, TEACHER, controls
from benchmarks.quality.rows.declare import PLAIN
from benchmarks.quality.ruler import KINDS

OPEN = "not measured"
TEACHERS = ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b")  # folders of records, and what their rows call the teacher
CHOSEN = "recommended"  # with kept keys
BUDGET, QUICK = "full", "quick"
ROTATIONS = 4
LETTERS = "ABCD"
TASKS = (("PIQA", "piqa", "acc_norm"), ("HellaSwag", "hellaswag", "acc_norm"), ("ARC-easy", "arc_easy", "acc"),
         ("LAMBADA", "lambada_openai", "acc"))  # fmt: skip
FAR = ((2048, 32_768), (32_768, None))  # positions of long texts
RULER_LENGTHS, PASSKEY = (4096, 8192, 16_384), 32_768
BEGIN, END = "<!-- the teachers that have the headline: written by `paper` -->", "<!-- end of what `paper` writes -->"
Value = Callable[[Record], float | None]


class Said(NamedTuple):
    """A line of one of the paper's tables, and the row of ours that it stands beside, "" for none."""

    name: str
    row: str
    llama: float | None  # MMLU of what was made of Llama-3-8B
    mistral: float | None = None
    average: float | None = None  # of PIQA, ARC-e, ARC-c, HellaSwag and WinoGrande, Llama-3-8B


TABLE_1 = (
    Said("teacher", TEACHER, 66.6, 62.4, 73.1),
    Said("Lizard", CHOSEN, 61.2, 60.8, 74.6),
    Said("Lizard without kept keys", PLAIN, 61.2, 60.8, 74.6),
    Said("Lizard as Table 13 has it", "paper", 61.2, 60.8, 74.6),
    Said("LoLCATs", "lolcats", 52.8, 51.4, 74.2),
    Said("Liger", "liger", 43.4, 36.3, 72.4),
    Said("SUPRA", "", None, 34.2),
    Said("Mamba2-LLaMA-3", "", 43.2),
)
TABLE_4 = (
    Said("a scalar", "gate-scalar", 61.2),
    Said("as Mamba-2's", "gate-mamba2", 57.6),
    Said("a channel, low rank (GLA)", "gate-channel", 53.5),
    Said("pooled, without parameters", "gate-pooling", 44.1),
)
WINDOWS, SINKS = (32, 64, 128, 256), (2, 4, 6)
TABLE_7 = {2: (51.3, 54.1, 58.6, 42.2), 4: (52.4, 57.6, 61.2, 44.6), 6: (52.4, 57.9, 60.8, 43.8)}
TABLE_10 = (
    Said("0%", PLAIN, 61.2),
    Said("25%", "recommended-softmax-25", 62.8),
    Said("50%", "recommended-softmax-50", 65.1),
    Said("75%", "recommended-softmax-75", 66.3),
    Said("100%", TEACHER, 66.6),
)


def paper_page(folder: Path) -> str:
    """The whole page, of the records in the folders of ``TEACHERS`` in ``folder``."""
    parts = [
        "# The paper's tables, ours beside theirs",
        "Written by `python -m benchmarks.quality paper` from the records in `quality/TEACHER/`; not to be edited. "
        "MMLU is 5-shot; by letter: the mean over the options in their order and rotated by one to three places; by "
        "continuation: the answer's text after the question. The paper's figures are of Llama-3-8B and Mistral-7B "
        "(arXiv 2507.09025), scored by the letter. Those are other teachers: compare shares of the teacher. Of two "
        "budgets a teacher shows that with the most rows of its first table, never rows of both beside each other. How "
        'rows are run: [docs/quality.md](../../docs/quality.md), "Larger teachers".',
    ]
    for teacher in TEACHERS:
        results = results_of(folder, teacher)
        parts += [f"## {teacher}", f"{told(results)}.", *_tables(results)]
    return "\n\n".join(parts) + "\n"


def first_table(folder: Path) -> str:
    """The table for docs/results.md, of the first of ``TEACHERS`` that has records, else of the first."""
    found = [(teacher, results_of(folder, teacher)) for teacher in TEACHERS]
    teacher, results = next((one for one in found if one[1].records), found[0])
    shown: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("MMLU by letter", lambda name: _both(results, name, by_letter)),
        ("by continuation", lambda name: _both(results, name, MMLU[1])),
        ("loss past 2048", lambda name: _plain(results.past(name))),
        ("share of the gap", lambda name: _share(results, name)),
        ("RULER 4K to 16K", lambda name: _both(results, name, _mean_ruler)),
    )
    return f"**Teacher {teacher}.** {told(results)}.\n\n{_upright(shown)}"


def shown_rows() -> list[tuple[str, str]]:
    """Rows of the first tables, and what these call them."""
    control = controls(ROWS[CHOSEN].spec(None, 0), BUDGETS[BUDGET])["control"].name
    return [
        (TEACHER, "teacher"), (control, "windows alone, trained alike"), (CHOSEN, "**`recommended`**, kept keys"),
        (PLAIN, "no kept keys"), ("recommended-softmax-25", "a quarter softmax"),
        ("paper", "`paper`"), ("lolcats", "`lolcats`"), ("liger", "`liger`"),
    ]  # fmt: skip


def write_paper(page: Path, results_page: Path, folder: Path) -> None:
    """Writes ``page`` whole, and in ``results_page`` what stands between its two marks. Raises ValueError without
    them."""
    write_whole(page, paper_page(folder))
    text = results_page.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"{results_page} lacks the marks {BEGIN!r} and {END!r}")
    write_whole(results_page, f"{before}{BEGIN}\n{first_table(folder)}\n{END}{after}")


def results_of(folder: Path, teacher: str) -> Results:
    """The records of a teacher, of the budget with the most rows of the first table, the full one of two alike.

    Raises ValueError for a record of another teacher.
    """
    names = [name for name, _ in shown_rows()]
    found = [_records_of(folder, teacher, budget) for budget in (BUDGET, QUICK)]
    return max(found, key=lambda results: sum(name in results.records for name in names))


def _records_of(folder: Path, teacher: str, budget: str) -> Results:
    path = folder / teacher / f"{budget}.jsonl"
    results = Results(path)
    for records in results.records.values():
        for record in records.values():
            if (found := record.values["settings"]["teacher"]) != teacher:
                raise ValueError(f"{path}: {record.name} is of {found!r}, wanted {teacher!r}")
    return results


def told(results: Results) -> str:
    """Tokens and machines of the rows, or that there are none."""
    records = [record for found in results.records.values() for record in found.values()]
    if not records:
        return "No row of this teacher has been run"
    tokens = {record.budget.tokens for record in records if record.values["stages"]}
    sizes = "; ".join(f"{first / 1e6:.1f}M tokens of stage 1, {second / 1e6:.1f}M of stage 2"
                      for first, second in sorted(tokens))  # fmt: skip
    return f"{sizes or 'Untrained rows alone'}; {'; '.join(sorted(results.machines()))}"


def headline(results: Results) -> str:
    """Every measure of the issue's rows in one table."""
    shown: tuple[tuple[str, Callable[[str], str]], ...] = (
        ("MMLU by letter", lambda name: _percent(results.number(name, by_letter))),
        ("chosen A, B, C, D", lambda name: _chosen(results, name)),
        ("by continuation", lambda name: _percent(results.number(name, _accuracy("mmlu", "acc")))),
        *((title, lambda name, task=task, metric=metric: _percent(results.number(name, _accuracy(task, metric))))
          for title, task, metric in TASKS),
        ("loss past 2048", lambda name: _plain(results.past(name))),
        ("share of the gap", lambda name: _share(results, name)),
        ("novels, 2K to 32K; past 32K", lambda name: _far(results, name, "length")),
        ("source, 2K to 32K; past 32K", lambda name: _far(results, name, "source")),
        ("RULER 4, 8, 16K", lambda name: ", ".join(
            _percent(results.number(name, _ruler(length)), 0) for length in RULER_LENGTHS)),
        ("passkey at 32K", lambda name: _percent(results.number(name, _passkey), 0)),
        ("next line, exact", lambda name: _percent(results.number(name, _lines), 0)),
    )  # fmt: skip
    return _upright(shown)


def _upright(shown: tuple[tuple[str, Callable[[str], str]], ...]) -> str:
    """A table with a line a measure and a column a row of ours."""
    cells = [[title, *(_once(value(name)) for name, _ in shown_rows())] for title, value in shown]
    return markdown(["", *(about for _, about in shown_rows())], cells)


def _tables(results: Results) -> list[str]:
    return [headline(results), _first(results), _gates(results), _windows(results), _softmax(results)]


def _first(results: Results) -> str:
    def average(record: Record) -> float | None:
        found = [_accuracy(task, metric)(record) for _, task, metric in TASKS[:3]]
        return None if None in found else statistics.mean(value for value in found if value is not None)

    cells = []
    for said in TABLE_1:
        ours = [_both(results, said.row, value) for value in MMLU]
        mean = _percent(results.number(said.row, average)) if said.row else ""
        theirs = [_of(said.llama, TABLE_1[0].llama), _of(said.mistral, TABLE_1[0].mistral)]
        cells.append([said.name, *theirs, _figure(said.average), *ours, mean])
    header = ["", "Llama-3-8B, MMLU", "Mistral-7B, MMLU", "average of five tasks, Llama-3-8B", "ours, MMLU by letter",
              "by continuation", "average of PIQA, HellaSwag, ARC-easy"]  # fmt: skip
    return "**Table 1: 5-shot MMLU**, in brackets the share of the teacher.\n\n" + markdown(header, cells)


def _gates(results: Results) -> str:
    return "**Table 4: the gate.**\n\n" + _lines_of(results, TABLE_4, "gate")


def _softmax(results: Results) -> str:
    return "**Table 10: the share of layers kept softmax**, ours those that save most KL.\n\n" + _lines_of(
        results, TABLE_10, "layers"
    )


def _lines_of(results: Results, table: tuple[Said, ...], title: str) -> str:
    cells = [
        [said.name, _figure(said.llama), *(_both(results, said.row, value) for value in MMLU),
         _once(_plain(results.past(said.row)))]
        for said in table
    ]  # fmt: skip
    return markdown([title, "paper, MMLU", "ours by letter", "by continuation", "loss past 2048"], cells)


def _windows(results: Results) -> str:
    cells = []
    for sinks in SINKS:
        names = [f"w{window}-m{sinks}" for window in WINDOWS]
        found = [f"{_percent(results.number(name, by_letter))}; {_plain(results.past(name))}" for name in names]
        cells.append([f"m = {sinks}, paper", *map(_figure, TABLE_7[sinks])])
        cells.append([f"m = {sinks}, ours", *map(_once, found)])
    header = ["", *(f"w = {window}" for window in WINDOWS)]
    return "**Table 7: window and meta memory.** MMLU; ours by letter, and loss past 2048.\n\n" + markdown(
        header, cells
    )


def _both(results: Results, row: str, value: Value) -> str:
    """A figure, and the share of the teacher's."""
    number, teacher = (results.number(name, value) for name in (row, TEACHER))
    if not row:
        return ""
    share = "" if number is None or teacher is None else f" ({number.mean / teacher.mean:.0%})"
    return _percent(number) + share


def _of(value: float | None, teacher: float | None) -> str:
    return "" if value is None or teacher is None else f"{value:.1f} ({value / teacher:.0%})"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _percent(number: Number | None, digits: int = 1) -> str:
    return OPEN if number is None else number.text(digits, percent=True)


def _plain(number: Number | None) -> str:
    return OPEN if number is None else number.text(3)


def _share(results: Results, name: str) -> str:
    """Of the gap that a row itself is the edge of, nothing."""
    return "" if name.startswith((TEACHER, "control")) else _percent(results.share(name), 0)


def _once(cell: str) -> str:
    """Not one "not measured" after the other."""
    parts = {part.strip() for part in cell.replace(";", ",").split(",")}
    return OPEN if parts == {OPEN} else cell


def _accuracy(task: str, metric: str) -> Value:
    def value(record: Record) -> float | None:
        return record.values["measures"].get("tasks", {}).get("metrics", {}).get(task, {}).get(metric)

    return value


def by_letter(record: Record) -> float | None:
    """5-shot MMLU by the letter, the mean over four rotations of the options; None unless all are measured."""
    found = [_accuracy(f"mmlu_letters{turn}", "acc")(record) for turn in range(ROTATIONS)]
    values = [value for value in found if value is not None]
    return statistics.mean(values) if len(values) == ROTATIONS else None


MMLU: tuple[Value, ...] = (by_letter, _accuracy("mmlu", "acc"))


def _chosen(results: Results, name: str) -> str:
    """How often each letter was chosen, over rotations and seeds, in percent."""
    counts = dict.fromkeys(LETTERS, 0)
    for record in results.records.get(name, {}).values():
        metrics = record.values["measures"].get("tasks", {}).get("metrics", {})
        for turn in range(ROTATIONS):
            for letter, count in metrics.get(f"mmlu_letters{turn}", {}).get("letters", {}).items():
                counts[letter] += count
    total = sum(counts.values())
    return ", ".join(f"{100 * count / total:.0f}" for count in counts.values()) if total else OPEN


def _far(results: Results, name: str, measure: str) -> str:
    """Loss of a long text from 2048 to 32,768 tokens, and after."""
    return "; ".join(_plain(results.number(name, _between(measure, *span))) for span in FAR)


def _between(measure: str, start: int, end: int | None) -> Value:
    """Mean loss of the positions between two edges, or from one on."""

    def value(record: Record) -> float | None:
        loss = record.losses(measure)
        if loss is None or start not in loss.edges[:-1] or (end is not None and end not in loss.edges):
            return None
        first, last = loss.edges.index(start), len(loss.means) if end is None else loss.edges.index(end)
        widths = [b - a for a, b in itertools.pairwise(loss.edges[first : last + 1])]
        return sum(w * m for w, m in zip(widths, loss.means[first:last], strict=True)) / sum(widths)

    return value


def _ruler(length: int) -> Value:
    def value(record: Record) -> float | None:
        found = record.values["measures"].get("ruler", {})
        shares = [found.get(kind, {}).get(str(length)) for kind in KINDS]
        return None if None in shares else statistics.mean(shares)

    return value


def _mean_ruler(record: Record) -> float | None:
    found = [_ruler(length)(record) for length in RULER_LENGTHS]
    values = [value for value in found if value is not None]
    return statistics.mean(values) if len(values) == len(found) else None


def _passkey(record: Record) -> float | None:
    return record.values["measures"].get("passkey", {}).get(str(PASSKEY))


def _lines(record: Record) -> float | None:
    """At the most text before a line."""
    found = record.values["measures"].get("lines", {})
    return found[max(found, key=int)] if found else None
