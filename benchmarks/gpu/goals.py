"""The goals for speed beside what the files of results show: figure, met, missed or not measured, file and command.

    python -m benchmarks.gpu.goals [--results benchmarks/results] [--markdown] [--out goals.json] [--strict]

Reads every JSON file under ``host``, ``decode``, ``kernels`` and ``training`` of the results, by what is in it, not by
its name. Of several files that measure a goal the newest counts; teacher and Lizard are compared within one file, thus
one run. A goal of several cases (lengths, batches) is missed where one case misses it, and not measured while one that
would decide is missing. Goals are for one H200 where they do not say a CPU; files of other chips are left aside.
``--strict`` ends with 1 while a goal is not met.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
FOLDERS = {"host": "host_time.py", "decode": "generate.py", "kernels": "kernel_times.py", "training": "train_step.py"}
BASE = (  # what docs/kernels.md shows
    "h200_graph.json", "h200_graph_gla.json", "h200_kept.json", "h200_kept_decode.json", "h200_score_step.json"
)  # fmt: skip
NOISE = 1.03  # times of a kernel's row that count as the same
SMALL, LARGE = "smollm2-135m", "llama-3-8b"
EMBEDDING = 128256 * 4096 * 2  # bytes, of the 8B shape
LENGTHS, CONTEXTS = (1024, 2048, 4096, 8192, 16384), (1024, 8192, 32768, 131072)
CPU_LENGTHS = (1024, 16384, 100_000)
LONG, SEVERAL = 131072, (1, 16, 64)
Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """One file of results."""

    path: str  # below the results
    content: Row = field(hash=False, compare=False)

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def date(self) -> str:
        return self.content["environment"].get("date", "")

    @property
    def device(self) -> str:
        environment = self.content["environment"]
        return str(environment.get("gpu") or environment.get("device") or "")

    @property
    def arguments(self) -> Row:
        return self.content.get("arguments", {})

    @property
    def rows(self) -> list[Row]:
        """Its rows; those of ``generate.py``, which reads one length, with that length."""
        length = {"length": self.arguments["prompt"]} if "prompt" in self.arguments else {}
        return [length | row for row in self.content.get("rows", [])]

    @property
    def command(self) -> str:
        """As the file has it, or as its arguments say."""
        kept = self.content.get("command") or self.content["environment"].get("command")
        if kept:
            return kept
        words = ["python", f"benchmarks/gpu/{FOLDERS[self.folder]}"]
        for name, value in self.arguments.items():
            if value is True:
                words.append(f"--{name.replace('_', '-')}")
            elif value is not None and value is not False and value != []:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name.replace('_', '-')}", *map(str, values)]
        return shlex.join(words)


@dataclass(frozen=True)
class Goal:
    """A line of the table. state: met, missed or not measured."""

    goal: str
    wanted: str
    found: str
    state: str
    files: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


Case = tuple[float, Report] | None  # a figure and where it is from


def reports(results: Path) -> list[Report]:
    """All files that carry their environment, the newest first."""
    found = []
    for path in (path for name in FOLDERS for path in sorted((results / name).glob("*.json"))):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "environment" in content:
            found.append(Report(str(path.relative_to(results)), content))
    return sorted(found, key=lambda report: report.date, reverse=True)


def judge(goal: str, wanted: str, cases: dict[str, Case], ok: Callable[[float], bool], form: str = "{:.2f}") -> Goal:
    """The goal's line from a figure for each case, None where there is none."""
    words, missing = [], [name for name, case in cases.items() if case is None]
    measured = {name: case for name, case in cases.items() if case is not None}
    for name, (value, report) in measured.items():
        beside = ", beside another program" if report.content.get("beside") else ""
        at = f" {name}" if name.startswith("(") else f" at {name}" if name else ""
        words.append(f"{form.format(value)}{at}{beside}")
    missed = any(not ok(value) for value, _ in measured.values())
    state = "missed" if missed else "not measured" if missing or not measured else "met"
    if missing and measured:
        words.append(f"not measured: {', '.join(missing)}")
    sources = dict.fromkeys(report for _, report in measured.values())
    return Goal(goal, wanted, "; ".join(words), state, [r.path for r in sources], [r.command for r in sources])


def on(found: Iterable[Report], folder: str, device: str = "H200") -> list[Report]:
    return [report for report in found if report.folder == folder and device in report.device]


def shown(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def one(report: Report, **wanted: Any) -> Row | None:
    """The row with these values that was measured, in it or in the report's arguments; None where there is none."""
    for row in report.rows:
        whole = report.arguments | row
        if all(whole.get(name) == value for name, value in wanted.items()) and "failed" not in row:
            return row
    return None


def newest(found: Iterable[Report], figure: Callable[[Report], float | None]) -> Case:
    for report in found:
        value = figure(report)
        if value is not None:
            return value, report
    return None


def read_speed(row: Row, batch: int) -> float | None:
    """Tokens a second of reading a prompt."""
    if row.get("prefill_tokens_s"):
        return row["prefill_tokens_s"]
    return 1e3 * batch * row["length"] / row["prefill_ms"] if row.get("prefill_ms") else None


def over(value: Callable[[Row], float | None], a: Row, b: Row, **where: Any) -> Callable[[Report], float | None]:
    """Of two rows of one report, told by a and b, the first's value over the second's."""

    def figure(report: Report) -> float | None:
        rows = one(report, **where, **a), one(report, **where, **b)
        values = [None if row is None else value(row) for row in rows]
        return None if None in values else values[0] / values[1]  # type: ignore[operator]

    return figure


def field_of(name: str, **where: Any) -> Callable[[Report], float | None]:
    def figure(report: Report) -> float | None:
        return (one(report, **where) or {}).get(name)

    return figure


def floor_ms(report: Report, row: Row) -> float:
    """Of a step of the 8B shape; ``generate.py`` counts the whole embedding too, of which a step looks up a row."""
    own = "counted_gib" in row
    return row["floor_ms"] - (0 if own else 1e3 * EMBEDDING / report.content["copy_bytes_s"])


def spread(lengths: tuple[int, ...], at: Row) -> Callable[[Report], float | None]:
    """Time of a token at the slowest of the lengths over that at the fastest, where the ends at least are measured."""

    def figure(report: Report) -> float | None:
        times = [(one(report, length=n, **at) or {}).get("ms_token") for n in lengths]
        known = [time for time in times if time is not None]
        return max(known) / min(known) if None not in (times[0], times[-1]) else None

    return figure


LIZARD, TEACHER, COMPILED = {"way": "lizard"}, {"way": "teacher"}, {"way": "teacher-static"}


def prefill(found: list[Report]) -> Iterator[Goal]:
    decode, at = on(found, "decode"), {"shape": SMALL, "batch": 1}

    def faster(length: int) -> Case:
        return newest(decode, over(lambda row: read_speed(row, 1), LIZARD, TEACHER, length=length, **at))

    cases = {shown(n): faster(n) for n in LENGTHS}
    yield judge("prefill, 135M, batch 1: tokens/s over the teacher's", "at least 1", cases, lambda x: x >= 1)
    yield judge("the same at 128K", "at least 3", {"": faster(LONG)}, lambda x: x >= 3)

    def growth(report: Report) -> float | None:
        rows = [one(report, length=n, way="lizard", **at) for n in (16384, LONG)]
        peaks = [(row or {}).get("read_peak_gib") for row in rows]
        return None if None in peaks else peaks[1] / peaks[0]  # type: ignore[operator]

    cases = {"": newest(decode, growth)}
    yield judge("its peak memory at 128K over that at 16K", "at most 1.05", cases, lambda x: x <= 1.05)


def host(found: list[Report]) -> Iterator[Goal]:
    for kind, words in (("prefill", "forward"), ("train", "forward and backward")):
        where = {"of": "layer", "kind": kind}
        pair = {"model": "lizard"}, {"model": "teacher"}
        cases = {
            name: newest(on(found, "host"), over(lambda row: row.get("host_us"), *pair, shape=shape, **where))
            for name, shape in (("135M", SMALL), ("8B", LARGE))
        }
        yield judge(f"host time of a layer, {words}, over the teacher's", "at most 1.2", cases, lambda x: x <= 1.2)


def generation(found: list[Report]) -> Iterator[Goal]:
    decode = on(found, "decode")
    own = {"shape": SMALL, "batch": 1, "way": "lizard"}
    for name, wanted, key, limit in (
        ("a token, ms", "at most 1.5", "ms_token", 1.5),
        ("first call, s", "at most 15", "first_call_s", 15),
    ):
        case = newest(decode, field_of(key, **own))
        yield judge(f"generate(), 135M, batch 1: {name}", wanted, {"": case}, lambda x, limit=limit: x <= limit)
    for batch in SEVERAL:
        at = {"shape": LARGE, "batch": batch, "way": "lizard"}

        def share(length: int, at: Row = at) -> Case:
            def figure(report: Report) -> float | None:
                row = one(report, length=length, **at) or {}
                measured = {"floor_ms", "ms_token"} <= row.keys()
                return 100 * floor_ms(report, row) / row["ms_token"] if measured else None

            return newest(decode, figure)

        cases = {shown(n): share(n) for n in CONTEXTS}
        goal = f"generate(), 8B shape, batch {batch}: share of the bandwidth floor"
        yield judge(goal, "at least 60%", cases, lambda x: x >= 60, "{:.0f}%")
        goal = f"the same, batch {batch}: slowest over fastest context, 1K to 128K"
        yield judge(goal, "at most 1.03", {"": newest(decode, spread(CONTEXTS, at))}, lambda x: x <= 1.03, "{:.3f}")


def beside_the_teacher(found: list[Report]) -> Iterator[Goal]:
    decode, at = on(found, "decode"), {"shape": LARGE, "batch": 16}
    case = newest(decode, over(lambda row: row.get("tokens_s"), LIZARD, COMPILED, length=32768, **at))
    goal = "8B shape, batch 16, context 32K: tokens/s over the compiled teacher's"
    yield judge(goal, "at least 4", {"": case}, lambda x: x >= 4)
    for report in decode:
        if {n: report.arguments.get(n) for n in at} == at:
            out = {row["way"]: row["length"] for row in reversed(report.rows) if row.get("failed") == "out of memory"}
            told = ", ".join(f"{way} from {shown(n)}" for way, n in sorted(out.items()) if way.startswith("teacher"))
            if told:
                yield Goal("where the teacher runs out of memory", "told", told, "met", [report.path], [report.command])
                return
    yield Goal("where the teacher runs out of memory", "told", "", "not measured")


def timed(report: Report) -> Iterator[tuple[str, float]]:
    """Every time in a file of kernels, by the name of its case."""
    for row in report.rows:
        for length, cell in row.items():
            for kind in ("forward_ms", "training_ms") if isinstance(cell, dict) else ():
                if kind in cell:
                    yield f"{row['group']}, {row['name']}, {length}, {kind[:-3]}", cell[kind]
        for part in ("score triton us", "layer triton us"):
            if part in row:
                yield f"{row['shape']}, batch {row['batch']}, {row['score']}, {part[:-3]}", row[part]
    for entry in report.content.get("times", []):
        for name, cell in entry.items():
            for kind in ("forward_ms", "training_ms") if isinstance(cell, dict) else ():
                if kind in cell:
                    yield f"kept, dim {entry['dim']}, {entry['length']}, {name}, {kind[:-3]}", cell[kind]
    for row in report.content.get("decode", {}).get("steps", []):
        if "us" in row:
            yield f"decode, batch {row['batch']}, kept {row['kept']}", row["us"]


def kernels(found: list[Report]) -> Iterator[Goal]:
    ours: dict[str, float] = {}
    of_kernels = on(found, "kernels")
    base = [report for report in of_kernels if Path(report.path).name in BASE]
    for report in reversed(base):
        ours |= {name: time for name, time in timed(report) if "fla " not in name and "full" not in name}
    later: dict[str, tuple[float, Report]] = {}
    for report in reversed(of_kernels):  # the newest last, which stays
        # only files whose calls were replayed from a graph, as those of the base were
        if report not in base and ("--graph" in report.command or "score_step.py" in report.command):
            later |= {name: (time / ours[name], report) for name, time in timed(report) if name in ours}
    cases: dict[str, Case] = dict(sorted(later.items(), key=lambda item: -item[1][0])[:3])
    if len(later) < len(ours):
        cases[f"{len(ours) - len(later)} of {len(ours)} times"] = None
    goal = "the tables of docs/kernels.md: time over that of 2026-11-29 and -30, the worst three"
    yield judge(goal, f"at most {NOISE}", cases, lambda x: x <= NOISE)


def fastest(rows: list[Row]) -> tuple[float, str] | None:
    """(ms of one sequence, kind) of those of ``train_step.py`` that were measured."""
    return min(((row["ms"] / row["batch"], row["kind"]) for row in rows if "ms" in row), default=None)


def training(found: list[Report]) -> Iterator[Goal]:
    files = [report for report in on(found, "training") if report.arguments.get("shape") == LARGE]

    def beside(stage: str, teacher: str, length: int, at: str) -> dict[str, Case]:
        """A step's time over the teacher's, each of the kind that is fastest, by the two kinds. A kind that the
        teacher's LoRA was not tried in does not count."""
        for report in files:
            rows = [row for row in report.rows if row["length"] == length]
            own, other = ([row for row in rows if row["stage"] == of] for of in (stage, teacher))
            tried = {row["kind"] for row in other}
            mine = fastest([row for row in own if row["kind"] in tried or teacher == "teacher forward"])
            if mine and (its := fastest(other)):
                return {f"{at}({mine[1]} beside {its[1]})": (mine[0] / its[0], report)}
        return {at.strip(): None}

    cases = {name: case for n in (2048, 8192) for name, case in
             beside("stage 1", "teacher forward", n, f"{shown(n)} ").items()}  # fmt: skip
    yield judge("8B shape: step of stage 1 over a teacher's forward", "at most 1.6", cases, lambda x: x <= 1.6)
    kinds = (("stage 2", ""), ("stage 2 CE", " on next tokens alone"))
    for (stage, how), (length, least) in itertools.product(kinds, ((2048, 1), (32768, 2))):
        cases = {name: case and (1 / case[0], case[1])
                 for name, case in beside(stage, "teacher LoRA", length, "").items()}  # fmt: skip
        goal = f"8B shape, {length} tokens: the teacher's LoRA step over stage 2's{how}"
        yield judge(goal, f"at least {least}", cases, lambda x, least=least: x >= least)


def cpu(found: list[Report]) -> Iterator[Goal]:
    files = [
        r for r in found if r.folder == "decode" and "NVIDIA" not in r.device and r.arguments.get("layers") is None
    ]
    at = {"shape": SMALL, "batch": 1}
    ratios = [over(lambda row: row.get("ms_token"), LIZARD, TEACHER, length=n, **at) for n in CPU_LENGTHS]
    cases = {shown(n): newest(files, ratio) for n, ratio in zip(CPU_LENGTHS, ratios, strict=True)}
    yield judge("CPU, 135M: a token's time over the teacher's", "at most 1", cases, lambda x: x <= 1)

    case = newest(files, spread(CPU_LENGTHS, at | LIZARD))
    yield judge("CPU, 135M: slowest over fastest length to 100K", "at most 1.1", {"": case}, lambda x: x <= 1.1)


TABLE = (prefill, host, generation, beside_the_teacher, kernels, training, cpu)


def goals(results: Path) -> list[Goal]:
    found = reports(results)
    return [goal for part in TABLE for goal in part(found)]


def markdown(table: list[Goal]) -> str:
    """A document: the table, and the command of each file in it."""
    lines = ["# Goals for speed", "", "    python -m benchmarks.gpu.goals --markdown > benchmarks/results/GOALS.md", ""]
    lines += [f"Goals are for one H200 unless they name a CPU. {counts(table)}.", ""]
    lines += ["| goal | wanted | measured | | file |", "|---|---|---|---|---|"]
    commands: dict[str, str] = {}
    for goal in table:
        state = goal.state if goal.state == "met" else f"**{goal.state}**"
        lines.append(f"| {goal.goal} | {goal.wanted} | {goal.found} | {state} | {', '.join(goal.files)} |")
        commands |= zip(goal.files, goal.commands, strict=True)
    return "\n".join([*lines, "", *(f"- {file}: `{command}`" for file, command in sorted(commands.items()))])


def counts(table: list[Goal]) -> str:
    found = {state: sum(goal.state == state for goal in table) for state in ("met", "missed", "not measured")}
    return ", ".join(f"{count} {state}" for state, count in found.items())


def text(table: list[Goal]) -> str:
    lines = []
    for goal in table:
        lines.append(f"{goal.state.upper():13} {goal.goal} (wanted: {goal.wanted})")
        if goal.found:
            lines.append(f"{'':13} {goal.found}")
        lines += [f"{'':13} {file}: {how}" for file, how in zip(goal.files, goal.commands, strict=True)]
    return "\n".join([*lines, counts(table)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="as benchmarks/results/GOALS.md has it")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--strict", action="store_true", help="end with 1 while a goal is not met")
    options = parser.parse_args()
    table = goals(options.results)
    print(markdown(table) if options.markdown else text(table))
    if options.out:
        options.out.write_text(json.dumps([asdict(goal) for goal in table], indent=1) + "\n")
    return int(options.strict and any(goal.state != "met" for goal in table))


if __name__ == "__main__":
    raise SystemExit(main())
