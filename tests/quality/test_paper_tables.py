"""The paper's tables beside ours: shares of the right teacher, letters counted, and nothing where nothing was run."""

import dataclasses
from pathlib import Path

import pytest
from measured import loss

from benchmarks.quality import paper_tables
from benchmarks.quality.paper_tables import BEGIN, CHOSEN, END, TEACHERS, first_table, paper_page, write_paper
from benchmarks.quality.records import change_record, merge_records
from benchmarks.quality.rows import BUDGETS, ROWS, TABLES, controls

ROOT = Path(__file__).parents[2]
SMALL = TEACHERS[1]
FULL = BUDGETS["full"]
EDGES = (0, 2048, 4096, 32_768, 65_536)
FAR = {"edges": EDGES, "means": [9.0, 4.65, 3.15, 5.0], "errors": [0.1] * 4}  # 3.25 = (2 x 4.65 + 28 x 3.15) / 30


def letters(*accuracies: float) -> dict:
    counts = {"A": 4, "B": 3, "C": 2, "D": 1}
    return {f"mmlu_letters{turn}": {"acc": acc, "letters": counts} for turn, acc in enumerate(accuracies)}


def write(folder, spec, value, metrics, budget=FULL, **measures) -> None:
    trained = {"stage1": {}} if spec.stage1 else {}
    record = {
        "settings": {"row": dataclasses.asdict(spec), "budget": dataclasses.asdict(budget), "teacher": SMALL},
        "measures": {"loss": loss(value), "tasks": {"metrics": metrics}, **measures},
        "stages": trained,
        "hashes": {},
        "environment": {"device": "a chip", "dtype": "bfloat16", "versions": {"torch": "1", "transformers": "2"}},
    }
    merge_records(folder / SMALL / f"{budget.name}.jsonl", {spec.stem: record})


@pytest.fixture
def results(tmp_path):
    ruler = {kind: {"4096": 0.9, "8192": 0.6, "16384": share} for kind, share in
             zip(paper_tables.KINDS, (0.0, 0.1, 0.2, 0.3), strict=True)}  # fmt: skip
    own = ROWS[CHOSEN].spec(None, 24)
    beside = controls(own, FULL)
    write(tmp_path, beside["teacher"], 3.0, letters(0.5, 0.4, 0.5, 0.6) | {"mmlu": {"acc": 0.4}}, ruler=ruler)
    write(tmp_path, beside["control"], 3.5, {})
    more = {
        "lines": {"512": 0.1, "8192": 0.3},
        "passkey": {"32768": 1.0},
        "length": FAR,
        "source": loss(1.5, EDGES[:-1]),
    }
    tasks = letters(0.5, 0.5, 0.4, 0.5) | {name: {"acc": 0.6, "acc_norm": 0.7} for name in ("piqa", "hellaswag")}
    write(tmp_path, own, 3.1, tasks | {"arc_easy": {"acc": 0.5}}, **more)
    write(tmp_path, ROWS["lolcats"].spec(None, 24), 4.0, letters(0.25, 0.25, 0.25))  # a rotation is missing
    write(tmp_path, ROWS["w64-m4"].spec(None, 24), 3.3, letters(0.3, 0.3, 0.3, 0.3))
    return tmp_path


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.split("\n") if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_shares_are_of_the_teacher_and_the_gap_of_the_control(results):
    page = paper_page(results).partition(f"## {SMALL}")[2]
    head, _, rest = page.partition("**Table 1")
    assert cells(head, "MMLU by letter")[:3] == ["50.0%", "not measured", "47.5%"]  # means of four rotations
    assert (
        cells(head, "chosen A, B, C, D")[0] == "40, 30, 20, 10" and cells(head, "MMLU by letter")[6] == "not measured"
    )
    assert cells(head, "share of the gap")[:4] == ["", "", "80%", "not measured"]
    assert cells(head, "novels, 2K to 32K; past 32K")[:3] == ["not measured", "not measured", "3.250; 5.000"]
    assert cells(head, "source, 2K to 32K; past 32K")[2] == "1.500; not measured"  # it ends there
    assert cells(head, "RULER 4, 8, 16K")[0] == "90%, 60%, 15%" and cells(head, "next line, exact")[2] == "30%"
    assert cells(head, "passkey at 32K")[2] == "100%"
    assert cells(rest, "Lizard") == ["61.2 (92%)", "60.8 (97%)", "74.6", "47.5% (95%)", "not measured", "63.3%"]
    assert cells(rest, "SUPRA") == ["", "34.2 (55%)", "", "", "", ""]
    assert cells(rest, "m = 4, ours") == ["not measured", "30.0%; 3.300", "not measured", "not measured"]
    assert cells(rest, "m = 4, paper") == ["52.4", "57.6", "61.2", "44.6"]
    assert cells(rest, "100%") == ["66.6", "50.0% (100%)", "40.0% (100%)", "3.000"]
    assert "20.0M tokens of stage 1, 20.0M of stage 2; a chip" in head


def test_the_budget_with_more_rows_is_shown_and_alone(results):
    quick = BUDGETS["quick"]
    for count, name in enumerate(("paper", "lolcats", "liger", "recommended-softmax-25", CHOSEN), 1):
        spec = ROWS[name].spec(list(range(24)), 24)
        write(results, spec, 3.7, letters(0.2, 0.2, 0.2, 0.2), budget=quick)
        head = paper_page(results).partition(f"## {SMALL}")[2].partition("**Table 1")[0]
        more = count > 4  # the full budget has the teacher, its control, one with kept keys and lolcats
        assert cells(head, "MMLU by letter")[2] == ("20.0%" if more else "47.5%")
        assert ("1.6M tokens of stage 1, 0.6M of stage 2" in head) == more
        assert ("20.0M tokens of stage 1" in head) != more


def test_every_row_of_the_tables_is_declared():
    said = (*paper_tables.TABLE_1, *paper_tables.TABLE_4, *paper_tables.TABLE_10)
    names = {line.row for line in said if line.row}
    names |= {f"w{window}-m{sinks}" for window in paper_tables.WINDOWS for sinks in paper_tables.SINKS}
    assert names <= ROWS.keys() and {row.name for row in TABLES["gates"].rows} >= {
        row.row for row in paper_tables.TABLE_4
    }


def test_the_page_is_written_whole_and_of_the_other_only_what_is_marked(results, tmp_path):
    page, other = tmp_path / "PAPER.md", tmp_path / "results.md"
    other.write_text("# Results\n")
    with pytest.raises(ValueError, match="lacks the marks"):
        write_paper(page, other, results)
    other.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_paper(page, other, results)
    assert other.read_text() == f"before\n{BEGIN}\n{first_table(results)}\n{END}\nafter\n"
    assert f"**Teacher {SMALL}.** " in first_table(results)  # the first that has rows
    change_record(results / SMALL / "full.jsonl", "lolcats.s0", lambda r: r["settings"].update(teacher="another"))
    with pytest.raises(ValueError, match=f"lolcats is of 'another', wanted '{SMALL}'"):
        write_paper(page, other, results)


def test_the_pages_here_are_those_of_the_records():
    folder = ROOT / "benchmarks" / "results" / "quality"
    assert (ROOT / "benchmarks" / "results" / "PAPER.md").read_text(encoding="utf-8") == paper_page(folder)
    assert f"{BEGIN}\n{first_table(folder)}\n{END}" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
