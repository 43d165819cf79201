"""What a student with kept keys is to reach, and whether the rows show it: seed by seed, and in the mean.

One row is held against every goal but that of the least memory, which has a row of its own. Which rows these are can be
said; else each is the one of the table ``kept`` that loses least past 2048 in the bytes allowed.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.bench import trials_of
from benchmarks.quality.costs import MORE, config_of, memory
from benchmarks.quality.goals import TASKS, accuracy, rise_far_away
from benchmarks.quality.records import read_records
from benchmarks.quality.results import Record, Results, markdown, mean_kl, narrow_controls
from benchmarks.quality.rows import TEACHER, rows_of

LARGE, SMALL = 40.0, 20.0  # MiB of a sequence, float32
KEPT = "kept"  # the table, and the mixer of associative recall
FOUND = ((2048, 1.0), (4096, 0.9))  # one passkey in filler: up to so many tokens, at least this share
TOLERANCE, FARTHEST = 0.1, 8192  # below the teacher's share, at any length up to this
ROUNDING = 1e-9  # of means and ratios that are to be a goal's own number
MET, MISSED, OPEN = "met", "**missed**", "not measured"
Show = Callable[[float], str]


@dataclass(frozen=True)
class Judged:
    """One goal, the figures of a row, and what follows."""

    goal: str
    row: str
    wanted: str
    reached: Callable[[float], bool]
    show: Show
    figures: dict[int, float] = field(default_factory=dict)  # by seed
    lacks: str = ""
    """What is not measured, where there are no figures."""
    every_seed: bool = False
    """Held against every seed, not against their mean."""

    @property
    def verdict(self) -> str:
        """met, missed or not measured."""
        if not self.figures:
            return OPEN
        values = [*self.figures.values()] if self.every_seed else [statistics.mean(self.figures.values())]
        return MET if all(map(self.reached, values)) else MISSED

    def cells(self, seeds: list[int]) -> list[str]:
        """Its line of the table."""
        by_seed = [self.show(self.figures[seed]) if seed in self.figures else "" for seed in seeds]
        mean = self.show(statistics.mean(self.figures.values())) if self.figures else ""
        verdict = self.verdict + f": {self.lacks}" * (not self.figures)
        return [self.goal, self.row, self.wanted, *by_seed, mean, verdict]


def recall_goals(results: Results, recall: Path, row: str = "", small: str = "") -> list[Judged]:
    """Every goal, held against ``row`` and ``small``; "" takes the best row in at most 40 and in at most 20 MiB.

    recall: the file of the records of associative recall from scratch.
    """
    row, small = row or best_row(results, LARGE), small or best_row(results, SMALL)
    return [
        _share(results, row, 0.9, LARGE),
        _share(results, small, 0.75, SMALL),
        _most(results, row, "KL to the teacher", 0.02, "kl", mean_kl),
        *_passkeys(results, row),
        _most(results, row, "loss from 16,384 on above that at 2048 to 4096", 0.03, "length", rise_far_away),
        *(_task(results, row, task) for task in TASKS),
        _recall(recall),
    ]


def goals_table(judged: list[Judged]) -> str:
    """A Markdown table, a line a goal."""
    seeds = sorted({seed for one in judged for seed in one.figures})
    header = ["goal", "row", "wanted", *(f"seed {seed}" for seed in seeds), "mean", "verdict"]
    return markdown(header, (one.cells(seeds) for one in judged))


def best_row(results: Results, mib: float) -> str:
    """The row with kept keys that loses least past 2048 in so much memory, "" where none is measured."""
    within = [name for name in keeping_rows() if memory(name) <= mib and results.past(name) is not None]
    return min(within, key=lambda name: results.past(name).mean, default="")  # type: ignore[union-attr]


def keeping_rows() -> list[str]:
    """The rows of the table ``kept`` that keep keys, but for bounds that no model reaches; ``recommended`` first."""
    rows = [row for row in rows_of(KEPT) if config_of(row.name).attention.keeps_keys and not row.oracle]
    return [row.name for row in sorted(rows, key=lambda row: row.on != "recommended")]


def _open(goal: str, row: str, wanted: str, lacks: str) -> Judged:
    return Judged(goal, row, wanted, lambda value: False, str, lacks=lacks if row else "no row in so many bytes")


def _named(row: str) -> str:
    return f"`{row}`" if row else ""


def _least(value: float, digits: int = 0) -> tuple[str, Callable[[float], bool], Show]:
    """A share that is to be at least so much: in words, whether it is, and how it is shown."""
    return f"at least {value:.0%}", lambda share: share >= value - ROUNDING, lambda share: f"{share:.{digits}%}"


def _share(results: Results, row: str, wanted: float, mib: float) -> Judged:
    goal, words = "share of the gap of a window of 128 past 2048", f"at least {wanted:.0%}, at most {mib:.0f} MiB"
    if not row:
        return _open(goal, row, words, "")
    shares = results.narrow_shares(row)
    taken = memory(row)
    if not shares:
        return _open(goal, _named(row), words, _lacking(results, row))
    return Judged(
        goal,
        f"{_named(row)}, {taken:.1f} MiB",
        words,
        lambda share: share >= wanted - ROUNDING and taken <= mib,
        lambda share: f"{share:.0%}",
        shares,
    )


def _lacking(results: Results, row: str) -> str:
    """Which of the rows that a share needs have no loss."""
    record = next(iter(results.records.get(row, {}).values()), None)
    needed = [row] if record is None else [spec.name for spec in narrow_controls(record).values()]
    return ", ".join(f"`{name}`" for name in needed if not results.has(name)) or "no loss past 2048"


def _most(
    results: Results, row: str, goal: str, most: float, measure: str, value: Callable[[Record], float | None]
) -> Judged:
    figures, wanted = results.by_seed(row, value), f"at most {most:.3f}"
    if not figures:
        return _open(goal, _named(row), wanted, f"`{measure}` of the row")
    return Judged(goal, _named(row), wanted, lambda n: n <= most + ROUNDING, lambda n: f"{n:.3f}", figures)


def _passkeys(results: Results, row: str) -> Iterator[Judged]:
    for longest, least in FOUND:
        wanted, reached, show = _least(least)
        goal = f"one passkey in filler, the worst length to {longest}"
        figures = _worst(results.by_seed(row, lambda r: found_shares(r, "filler")), longest)
        if figures:
            yield Judged(goal, _named(row), wanted, reached, show, figures)
        else:
            yield _open(goal, _named(row), wanted, f"`found` of the row to {longest}")
    for goal, measure, kind in (("one passkey in novels", "found", "novel"), ("five passkeys", "passkeys5", "")):
        goal += f" beside the teacher, the worst length to {FARTHEST}"
        wanted = f"at least {-100 * TOLERANCE:.0f} points"
        read = functools.partial(shares_of, measure=measure, kind=kind)
        own, teacher = results.by_seed(row, read), results.by_seed(TEACHER, read)
        prompts, asked = (_prompts(results, name, measure, read) for name in (row, TEACHER))
        if own and teacher and prompts != asked:
            yield _open(goal, _named(row), wanted, f"`{measure}` of both with as many prompts, got {prompts}, {asked}")
            continue
        beside = next(iter(teacher.values()), {})
        above = {
            seed: {length: share - beside[length] for length, share in shares.items() if length in beside}
            for seed, shares in own.items()
        }
        figures = _worst(above, FARTHEST)
        if figures:
            yield Judged(
                goal,
                _named(row),
                wanted,
                lambda d: d >= -TOLERANCE - ROUNDING,
                lambda d: f"{100 * d:+.0f} points",
                figures,
            )
            continue
        lacks = [whose for whose, there in (("the row", own), ("the teacher", teacher)) if not _worst(there, FARTHEST)]
        yield _open(goal, _named(row), wanted, f"`{measure}` of {' and '.join(lacks)} to {FARTHEST}")


def _prompts(results: Results, name: str, measure: str, read: Callable[[Record], Any]) -> str:
    """Prompts a length of every seed that has the measure."""
    counts = results.by_seed(name, lambda r: trials_of(r.values, measure) if read(r) else None)
    return " and ".join(map(str, sorted(set(counts.values()))))


def _worst(shares: Mapping[int, Mapping[int, float]], longest: int) -> dict[int, float]:
    """The least of each seed up to a length, of the seeds in which that length was measured."""
    return {
        seed: min(share for length, share in found.items() if length <= longest)
        for seed, found in shares.items()
        if longest in found
    }


def found_shares(record: Record, kind: str, suffix: str = "") -> dict[int, float] | None:
    """One passkey by length in ``filler`` or ``novel``. In filler it is what greedy generation answers, too.

    suffix: of the measures' names, ``SPACED`` for what was asked before.
    """
    read = shares_of(record, "found" + suffix, kind)
    return read or (shares_of(record, "passkey" + suffix) if kind == "filler" else None)


def shares_of(record: Record, measure: str, kind: str = "") -> dict[int, float] | None:
    """The shares of a measure of passkeys by length, None where it was not measured."""
    found: dict[str, Any] = record.values["measures"].get(measure, {})
    found = found.get(kind, {}) if kind else found
    return {int(length): share for length, share in found.items()} or None


def _task(results: Results, row: str, task: str) -> Judged:
    goal = f"{task} beside the teacher"
    wanted, reached, show = _least(0.99, digits=1)
    own, teacher = results.by_seed(row, accuracy(task)), results.number(TEACHER, accuracy(task))
    if own and teacher is not None:
        return Judged(
            goal, _named(row), wanted, reached, show, {seed: value / teacher.mean for seed, value in own.items()}
        )
    lacks = [whose for whose, there in (("the row", own), ("the teacher", teacher)) if not there]
    return _open(goal, _named(row), wanted, f"`tasks` of {' and '.join(lacks)}")


def _recall(path: Path) -> Judged:
    """Associative recall from scratch: mean accuracy with kept keys above that of the hybrid without."""
    goal, wanted = "associative recall from scratch, above the hybrid at equal bytes", "above, in every seed"
    kinds: dict[str, dict[int, dict[str, Any]]] = {}
    for record in read_records(path).values():
        kinds.setdefault(record["settings"]["mixer"], {})[record["settings"].get("seed", 0)] = record
    own, other = kinds.get(KEPT, {}), kinds.get("lizard", {})

    def mean(record: dict[str, Any]) -> float:
        return statistics.mean(record["accuracy"].values())

    both = sorted(own.keys() & other.keys())
    if not both:
        lacks = [f"`{kind}`" for kind, there in ((KEPT, own), ("lizard", other)) if not there]
        return _open(goal, f"`mqar`, `{KEPT}`", wanted, " and ".join(lacks) or "the same seeds")
    larger = [seed for seed in both if own[seed]["memory_bytes"] > MORE * other[seed]["memory_bytes"]]
    return Judged(
        goal,
        f"`mqar`, `{KEPT}`" + ", with more bytes" * bool(larger),
        wanted,
        lambda above: above > 0 and not larger,
        lambda above: f"{100 * above:+.1f} points",
        {seed: mean(own[seed]) - mean(other[seed]) for seed in both},
        every_seed=True,
    )
