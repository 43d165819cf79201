"""The rows of every table, each declared once in the file of its table; everything else derives from here."""

from benchmarks.quality.rows import (
    choices,
    gates,
    kept,
    longer,
    lora,
    parts,
    presets,
    rates,
    retrieval,
    softmax,
    timescales,
    wide,
    windows,
)
from benchmarks.quality.rows.declare import BASE, PASSKEYS, PLAIN, Layers, Order, Row, Table
from benchmarks.quality.rows.spec import (
    BUDGETS,
    MEASURES,
    TEACHER,
    Budget,
    RowSpec,
    controls,
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        presets.TABLE,
        presets.REFERENCES,
        gates.TABLE,
        parts.TABLE,
        windows.TABLE,
        lora.TABLE,
        rates.TABLE,
        timescales.TABLE,
        softmax.TABLE,
        wide.TABLE,
        kept.TABLE,
        choices.TABLE,
        retrieval.TABLE,
        longer.TABLE,
    )
}
ROWS: dict[str, Row] = {row.name: row for table in TABLES.values() for row in table.rows}


def rows_of(name: str) -> list[Row]:
    """The rows of a table: those that its rows stand beside, where it compares, its own, and those that name it."""
    table = TABLES[name]
    shown = [row for row in ROWS.values() if row in table.rows or name in row.also]
    beside = [ROWS[row.reference] for row in shown if table.title and row.reference]
    return list({row.name: row for row in (*beside, *shown)}.values())


__all__ = [
    "BASE",
    "BUDGETS",
    "MEASURES",
    "PASSKEYS",
    "PLAIN",
    "ROWS",
    "TABLES",
    "TEACHER",
    "Budget",
    "Layers",
    "Order",
    "Row",
    "RowSpec",
    "Table",
    "controls",
    "rows_of",
]
