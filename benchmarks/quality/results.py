"""The rows' records, read: numbers by row and seed, shares against the right controls, means and spreads."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.quality.records import read_records
from benchmarks.quality.rows import BASE, BUDGETS, PLAIN, ROWS, TEACHER, Budget, RowSpec, controls
from lizard_models.config import LizardConfig
from lizard_models.evaluation.position_loss import PositionLoss, recovered_share
from lizard_models.evaluation.report import past_edge

T = TypeVar("T")
NARROW = 128  # the window whose gap the recovered share is of, where rows with other windows stand side by side


@dataclass(frozen=True)
class Number:
    """Mean over seeds, standard deviation over seeds (None for one seed), and how many."""

    mean: float
    spread: float | None
    seeds: int

    def text(self, digits: int = 3, percent: bool = False) -> str:
        """As a table has it."""
        scale, sign = (100, "%") if percent else (1, "")
        shown = f"{scale * self.mean:.{digits}f}"
        return f"{shown}{sign}" if self.spread is None else f"{shown} ± {scale * self.spread:.{digits}f}{sign}"


@dataclass(frozen=True)
class Record:
    """One row's record."""

    values: dict[str, Any]

    @property
    def name(self) -> str:
        """The row's name."""
        return self.values["settings"]["row"]["name"]

    @property
    def seed(self) -> int:
        """The row's seed."""
        return self.values["settings"]["row"]["seed"]

    @functools.cached_property
    def spec(self) -> RowSpec:
        """What the row is, by the configuration it trained with: its preset may have changed since.

        Raises ValueError for a configuration with options that the library has no more.
        """
        settings = self.values["settings"]
        row = RowSpec(**settings["row"])
        if "config" not in settings:
            return row
        trained = self.config.to_dict()
        return replace(
            row, changes={**row.changes, **{part: trained[part] for part in ("attention", "stage1", "stage2")}}
        )

    @functools.cached_property
    def config(self) -> LizardConfig:
        """What it trained with, where its record says so, else what it is declared as now."""
        settings = self.values["settings"]
        if "config" in settings:
            return LizardConfig.from_dict(settings["config"])
        return RowSpec(**settings["row"]).config(self.budget, 0)

    @functools.cached_property
    def controls(self) -> dict[str, RowSpec]:
        """The teacher and the window control that were trained as it was."""
        return controls(self.spec, self.budget)

    @property
    def budget(self) -> Budget:
        """How long it trained."""
        return Budget(**self.values["settings"]["budget"])

    def losses(self, *path: str) -> PositionLoss | None:
        """Losses by position under keys of ``measures``, e.g. ("loss",) or ("branches", "without_linear")."""
        found: Any = self.values["measures"]
        for key in path:
            found = found.get(key) if found else None
        return None if found is None else as_loss(found)


class Results:
    """The rows of one budget that are declared, and the controls of these, from its file of records.

    The file has others too, of rows whose options are retired: they are not read further. What a file lacks of the
    teacher as it is, which no budget changes, is that of the other budget's beside it.
    """

    def __init__(self, path: Path) -> None:
        every = [Record(values) for values in read_records(path).values()]
        declared = [record for record in every if record.name in ROWS]
        beside = {one.name for record in declared for one in record.controls.values()}
        self.records: dict[str, dict[int, Record]] = {}
        for record in every:
            if record.name in ROWS or record.name in beside:
                self.records.setdefault(record.name, {})[record.seed] = record
        for budget in BUDGETS:
            other = path.with_name(f"{budget}.jsonl")
            if other != path and other.is_file():
                self._take_teacher([Record(values) for values in read_records(other).values()])

    def _take_teacher(self, others: list[Record]) -> None:
        """Measures of the untrained teacher that are not there yet."""
        for record in others:
            own = self.records.get(TEACHER, {}).get(record.seed)
            if record.name == TEACHER and own is not None and not (record.spec.stage2 or own.spec.stage2):
                measures = record.values["measures"] | own.values["measures"]
                self.records[TEACHER][record.seed] = Record(own.values | {"measures": measures})

    def has(self, name: str, measure: str = "loss") -> bool:
        """Whether a row has a measure."""
        return any(measure in record.values["measures"] for record in self.records.get(name, {}).values())

    def number(self, name: str, value: Callable[[Record], float | None]) -> Number | None:
        """A value of a row over its seeds, None where no seed has it."""
        values = [*self.by_seed(name, value).values()]
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Number(statistics.mean(values), spread, len(values))

    def by_seed(self, name: str, value: Callable[[Record], T | None]) -> dict[int, T]:
        """A value of a row by seed, of the seeds that have it."""
        records = self.records.get(name, {})
        return {seed: v for seed, record in sorted(records.items()) if (v := value(record)) is not None}

    def past(self, name: str) -> Number | None:
        """Loss past 2048 (or the last edge below it)."""
        return self.number(name, past_loss)

    def share(self, name: str) -> Number | None:
        """Recovered share past 2048 against control and teacher of the same seed, trained alike."""
        if name.startswith(("teacher", "control")):
            return None
        return self.number(name, lambda record: self._share(record, record.controls))

    def narrow_share(self, name: str) -> Number | None:
        """The share of the gap of a window of 128 in every layer, of a row or of its own control."""
        return self.number(name, lambda record: self._share(record, narrow_controls(record)))

    def narrow_shares(self, name: str) -> dict[int, float]:
        """The same by seed."""
        return self.by_seed(name, lambda record: self._share(record, narrow_controls(record)))

    def beside(self, name: str, other: str) -> float | None:
        """Loss past 2048 of a row minus that of another, each above the teacher trained alike where these are two.

        Fine-tuning on text moves every model toward it. None where a row, or one of two teachers, was not measured.
        """
        rows = [self.past(name), self.past(other)]
        records = [next(iter(self.records.get(row, {}).values()), None) for row in (name, other)]
        alike = [None if r is None else r.controls["teacher"].name for r in records]
        if alike[0] != alike[1]:
            rows += [self.past(teacher) if teacher is not None else None for teacher in alike]
        if any(row is None for row in rows):
            return None
        first, second, *teachers = (row.mean for row in rows if row is not None)
        return first - second - (teachers[0] - teachers[1] if teachers else 0.0)

    def _share(self, record: Record, roles: dict[str, RowSpec]) -> float | None:
        """roles: the teacher and the control that are meant."""
        loss = record.losses("loss")
        if loss is None:
            return None
        beside = {}
        for role, spec in roles.items():
            found = self.records.get(spec.name, {})
            one = found.get(record.seed) or found.get(0)
            beside[role] = None if one is None else one.losses("loss")
        edge = past_edge(loss.edges)
        if edge is None or beside["teacher"] is None or beside["control"] is None:
            return None
        return recovered_share(beside["teacher"], beside["control"], loss, edge)

    def kl(self, name: str) -> Number | None:
        """KL to the untrained teacher, mean over positions."""
        return self.number(name, mean_kl)

    def restoration(self) -> dict[str, Any] | None:
        """What restoring layers saves, by ``plain`` or ``base``, which stage 1 trains alike."""
        for name in (PLAIN, BASE):
            record = self.records.get(name, {}).get(0)
            if record is not None and (measured := record.values["measures"].get("restore")):
                return measured
        return None

    def hashes(self) -> dict[str, set[str]]:
        """The hashes of the data that the rows saw."""
        found: dict[str, set[str]] = {}
        for records in self.records.values():
            for record in records.values():
                for key, value in record.values["hashes"].items():
                    found.setdefault(key, set()).add(value[:12])
        return found

    def machines(self) -> set[str]:
        """Chips and versions the rows ran with."""
        return {
            f"{e['device']}, torch {e['versions']['torch']}, transformers {e['versions']['transformers']}, {e['dtype']}"
            for records in self.records.values()
            for e in (record.values["environment"] for record in records.values())
        }


def narrow_controls(record: Record) -> dict[str, RowSpec]:
    """Teacher and control, trained as a row was, of a window of 128 in every layer whatever the row's own windows."""
    spec = record.spec
    attention = {**spec.changes.get("attention", {}), "window": NARROW}
    return controls(replace(spec, changes={**spec.changes, "wide_layers": [], "attention": attention}), record.budget)


def past_loss(record: Record) -> float | None:
    """Loss past 2048 (or the last edge below it) of one record."""
    loss = record.losses("loss")
    edge = None if loss is None else past_edge(loss.edges)
    return None if loss is None or edge is None else loss.past(edge)


def mean_kl(record: Record) -> float | None:
    """KL to the untrained teacher of one record, mean over positions."""
    kl = record.losses("kl")
    return None if kl is None else kl.past(0)


def as_loss(values: dict[str, Any]) -> PositionLoss:
    """The inverse of a loss's JSON; an unknown error is NaN again."""
    errors = tuple(float("nan") if error is None else error for error in values["errors"])
    means = tuple(float("nan") if mean is None else mean for mean in values["means"])
    return PositionLoss(tuple(values["edges"]), means, errors)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
