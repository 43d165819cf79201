"""Rows are declared in one place: tables, evidence, plots, goals and costs derive from there."""

import dataclasses

import pytest
from measured import BUDGET, write_row

from benchmarks.quality import rows
from benchmarks.quality.costs import costs, memory
from benchmarks.quality.reasons import fields
from benchmarks.quality.report import quality_text
from benchmarks.quality.results import Results
from benchmarks.quality.rows import BUDGETS, ROWS, TABLES, Layers, Row, Table, rows_of
from benchmarks.quality.rows.find import find_rows

LAYERS = 30
ORDER = range(LAYERS)


def test_declarations_name_what_there_is():
    declared = [row for table in TABLES.values() for row in table.rows]
    assert len(declared) == len(ROWS) == len({row.name for row in declared})
    for row in declared:
        assert row.about and "|" not in row.about and set(row.also) <= set(TABLES), row.name
        assert not row.reference or row.reference in ROWS, row.name
        assert row.goal in ("", "passkeys", "rival") and row.group in ("", "wide", "softmax"), row.name
    assert sum(map(len, fields().values())) == sum(bool(row.field) for row in declared)


def test_tables_show_what_their_rows_stand_beside():
    assert [row.name for row in rows_of("gates")][:2] == ["base", "gate-scalar"]
    assert {"base", "paper", "A1-sink-linear", "A6-gate-half"} <= {row.name for row in rows_of("choices")}
    assert "base" not in {row.name for row in rows_of("presets")}  # which shows every preset, and compares in no table
    assert ROWS["A1-sink-linear"].reference == "paper" and ROWS["plain"].reference == "base"
    wide = ROWS["recommended-widened-8x1024-stretch8-longer-x4"]
    assert wide.reference == "recommended-widened-8x1024-longer-x4" and wide.field == "wide_gate_stretch"


def test_a_row_changes_what_it_says_on_top_of_what_it_starts_from():
    found = ROWS["lora-r4"].spec(None, LAYERS).config(BUDGETS["quick"], LAYERS)
    assert (found.stage2.lora_rank, found.stage2.learning_rate, found.attention.gate_init) == (4, 5e-4, 0.993)
    found = ROWS["recommended-softmax-12.5"].spec([9, 3, 7, 5, 1], 30).config(BUDGETS["quick"], LAYERS)
    assert found.softmax_layers == (3, 5, 7, 9) and found.stage2.lora_rank == 32
    assert Layers(percent=12.5, even=True).pick(None, 30) == [3, 11, 18, 26]
    with pytest.raises(ValueError, match=r"softmax-25: which layers save most KL is not measured yet"):
        ROWS["softmax-25"].spec(None, LAYERS)
    assert ROWS["softmax-25-uniform"].spec(None, LAYERS).changes["softmax_layers"]


def test_what_takes_more_memory_or_more_training_is_costlier():
    assert memory("plain") == pytest.approx(17.2, abs=0.05)
    assert memory("recommended-widened-8x1024") == pytest.approx(38.3, abs=0.05)
    for row in ROWS.values():
        if row.reference and memory(row.name) > 1.01 * memory(row.reference):
            assert costs(row.name).startswith(f"{memory(row.name):.1f} MiB in place of"), row.name
    free = {"no-anchors", "w64-a4", "gate-scalar", "stage2-lr-1e-3", "A4-tied", "lora-r4"}
    dear = {"w256-a4", "softmax-25", "A4-query-head-keys", "features-512", "lora-r16", "lora-all"}
    dear |= {"recommended-wide-4x1024-longer-x4", "recommended-wide-8x1024-stretch8-longer-x4"}
    assert not any(costs(name) for name in free) and all(costs(name) for name in dear)


def test_a_new_row_needs_nothing_but_its_declaration(folder, monkeypatch):
    new = Row(
        name="half-a-window",
        about="a window of 64, wide where it matters",
        on="recommended",
        changes={"attention": {"window": 64}},
        wide=Layers(count=2),
        field="attention.window",
        costs="patience",
        also=("choices",),
        compared=True,
        goal="rival",
    )
    table = dataclasses.replace(TABLES["gates"], rows=(*TABLES["gates"].rows, new))
    monkeypatch.setitem(TABLES, "gates", table)
    monkeypatch.setitem(rows.ROWS, new.name, new)
    spec = new.spec(ORDER, LAYERS)
    names = [row.name for row in find_rows(["gates"], [0], BUDGET, order=ORDER, layers=LAYERS)]
    assert new.name in names and "recommended" in names and any(n.startswith("control-w64-wide2") for n in names)
    assert new in rows_of("choices") and isinstance(table, Table)
    write_row(folder, spec, 3.0)
    page = quality_text(folder, folder, "figures")
    lines = [line for line in page.splitlines() if new.name in line]
    assert any(line.startswith(f"| {new.name} | 4.000 | 3.000") for line in lines)  # losses by position
    assert sum(line.startswith(f"| {new.name} | {new.about} | 3.000 | -0.110 (recommended)") for line in lines) == 2
    assert any(line.startswith("| `attention.window` |") and "patience" in line for line in lines)
    assert Results(folder / "quick.jsonl").has(new.name)
