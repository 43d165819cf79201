"""The figure of what memory buys: which rows stand on one line, where, and the same bytes twice."""

import dataclasses
import re

import pytest
from measured import BUDGET, write_row
from typer.testing import CliRunner

from benchmarks.quality.__main__ import app
from benchmarks.quality.curve import curve_lines, panels, write_curve
from benchmarks.quality.records import change_record
from benchmarks.quality.results import Results
from benchmarks.quality.rows import ROWS, RowSpec, controls

TEACHER = RowSpec(name="teacher", preset="teacher", stage1=False, stage2=False)
DRAWN = {
    "plain": 3.2, "recommended-w384": 3.1, "recommended-w256": 3.15, "recommended-wide-4x2048-longer-x4": 3.08,
    "recommended-wide-8x1024-longer-x4": 3.07, "recommended-kept-256": 3.05, "recommended-kept-64": 3.15,
    "recommended-kept-256-received": 3.04, "recommended-kept-160-left-longer-x4": 3.06,
    "recommended-kept-480-left-longer-x4": 3.02, "recommended": 3.01, "recommended-176": 3.04,
    "recommended-kept-256-oracle": 3.01, "recommended-softmax-12.5": 3.02, "recommended-softmax-25": 3.01,
}  # fmt: skip
ELSEWHERE = ("recommended-kept-256-received-longer-x4-passkeys", "recommended-wide-8x1024-stretch8-longer-x4", "base")


@pytest.fixture
def folder(tmp_path):
    specs = {name: ROWS[name].spec(range(30), 30) for name in (*DRAWN, *ELSEWHERE)}
    for name, spec in specs.items():
        found = {"filler": {"2048": 0.5, "4096": 0.25}, "novel": {"2048": 0.1}}
        write_row(tmp_path, spec, DRAWN.get(name, 3.3), found=found)
    write_row(tmp_path, dataclasses.replace(specs["plain"], seed=1), 3.22, passkey={"2048": 0.3, "4096": 0.05})
    write_row(tmp_path, controls(specs["plain"], BUDGET)["control"], 3.4)
    write_row(tmp_path, TEACHER, 3.0)
    return tmp_path


def test_a_line_joins_rows_that_differ_in_their_bytes_alone(folder):
    lines = curve_lines(Results(folder / "quick.jsonl"))
    assert {name for line in lines for name in line.points} == {*DRAWN}  # the same text, steps and decays
    assert [(line.family, line.length, sorted(line.points)) for line in lines] == [
        ("window", 1024, ["plain", "recommended-w256", "recommended-w384"]),
        ("wide", 4096, ["recommended-wide-4x2048-longer-x4", "recommended-wide-8x1024-longer-x4"]),
        ("kept", 1024, ["recommended-kept-256", "recommended-kept-64"]),
        ("kept", 1024, ["recommended-kept-256-oracle"]),
        ("kept", 1024, ["recommended-kept-256-received"]),
        ("left", 4096, ["recommended-kept-160-left-longer-x4", "recommended-kept-480-left-longer-x4"]),
        ("shared", 4096, ["recommended", "recommended-176"]),
        ("softmax", 1024, ["recommended-softmax-12.5", "recommended-softmax-25"]),
    ]
    assert [[*line.points] for line in lines if line.oracle] == [["recommended-kept-256-oracle"]]
    places = {name: mib for line in lines for name, mib in line.points.items()}
    # 8 layers x 8,192 tokens x 3 heads x (key and value of 64) x 4 bytes = 96 MiB, and 22 layers of recommended
    assert places["recommended-softmax-25"] == pytest.approx(96 + places["plain"] * 22 / 30)
    assert places["recommended-kept-256"] == pytest.approx(40.17, abs=0.01)


def test_no_figure_has_passkeys_of_both_kinds(folder):
    """Those with the space before them are drawn where more rows have them, and said to be so."""
    results = Results(folder / "quick.jsonl")
    assert [panel.title for panel in panels(results)][2] == "one passkey, 2,048 tokens (% found)"
    for name in DRAWN:

        def rename(record):
            for key in ("found", "passkey"):
                if key in record["measures"]:
                    record["measures"][key + "_and_space"] = record["measures"].pop(key)

        change_record(folder / "quick.jsonl", f"{name}.s0", rename)
    results = Results(folder / "quick.jsonl")
    panel = panels(results)[3]
    assert panel.title == "one passkey and the space before it, 4,096 tokens (% found)"
    assert results.number("recommended", panel.value).mean == 25 and results.number("base", panel.value) is None


def test_another_preset_later_moves_no_row_that_is_recorded(folder):
    """A record says what its row trained with, whatever ``recommended`` is since."""
    config = ROWS["recommended-kept-64"].spec(None, 30).config(BUDGET, 30)
    for seed in (0, 1):
        change_record(folder / "quick.jsonl", f"plain.s{seed}", lambda r: r["settings"].update(config=config.to_dict()))
    lines = curve_lines(Results(folder / "quick.jsonl"))
    line = next(line for line in lines if "plain" in line.points)
    assert line.family == "kept" and line.points["plain"] == line.points["recommended-kept-64"]


def test_the_figure_by_its_command_is_the_same_byte_for_byte(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("curve") / "there" / "curve.svg"
    drawn = CliRunner().invoke(app, ["curve", "--out", str(folder), "--path", str(target)])
    assert drawn.exit_code == 0, drawn.output
    text = target.read_text()
    assert text.startswith("<?xml") and len(text) < 70_000 and "<dc:date>" not in text
    words = " ".join(re.findall(r"<text[^>]*>(.*?)</text>", text))
    lines = (
        "a window of 128 alone, 5.8 MiB",
        "the teacher, 360 MiB",
        "kept keys, in the sums too",
        "softmax layers, 8,192",
    )
    for said in ("budget quick: 1.6M tokens of stage 1, 0.6M of stage 2", "trained on 4,096 tokens at a time", *lines):
        assert said in words, said
    assert write_curve(Results(folder / "quick.jsonl"), target) and target.read_text() == text
    refused = CliRunner().invoke(app, ["curve", "--budget", "full", "--out", str(folder), "--path", str(target)])
    assert refused.exit_code == 2 and "curve: rows of the budget full" in refused.stderr


def test_rows_that_spend_their_bytes_in_one_way_are_not_drawn(folder):
    few = folder / "few"
    for name in ("plain", "recommended-w384"):
        write_row(few, ROWS[name].spec(None, 30), 3.0)
    assert not write_curve(Results(few / "quick.jsonl"), few / "none.svg") and not (few / "none.svg").exists()
