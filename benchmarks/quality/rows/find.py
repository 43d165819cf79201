"""Rows by the names of tables and rows, with the controls that each needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.quality.rows import ROWS, TABLES, rows_of
from benchmarks.quality.rows.declare import Order
from benchmarks.quality.rows.spec import TEACHER, Budget, RowSpec, controls


def find_rows(
    names: Iterable[str], seeds: Sequence[int], budget: Budget, *, order: Order, layers: int, with_controls: bool = True
) -> list[RowSpec]:
    """The rows of tables or single rows and controls by name, each with its controls before it, every seed, none twice.

    Untrained rows have no seed but 0. Raises ValueError for a name that is neither table nor row, and for one that
    needs the order of the layers where that is None.
    """
    names = list(names)
    beside: dict[str, RowSpec] = {}
    if set(names) - set(TABLES) - set(ROWS):  # controls, which take a while to name
        known = [row.spec(order, layers) for row in ROWS.values() if order is not None or not row.needs_order]
        beside = {one.name: one for row in known for one in controls(row, budget).values()}
    found: dict[str, RowSpec] = {}
    for name in names:
        if name in TABLES:
            rows = [row.spec(order, layers) for row in rows_of(name)]
        elif name in ROWS:
            rows = [ROWS[name].spec(order, layers)]
        elif name in beside:
            rows = [beside[name]]
        else:
            raise ValueError(f"no table or row {name!r}; tables: {', '.join(TABLES)}; rows: {', '.join(ROWS)}")
        for row in rows:
            for seed in seeds if row.stage1 or row.stage2 else [0]:
                seeded = replace(row, seed=seed)
                control = row.preset in (TEACHER, "window_only")
                needed = controls(seeded, budget).values() if with_controls and not control else []
                for one in (*needed, seeded):
                    found.setdefault(one.stem, one)
    return list(found.values())
