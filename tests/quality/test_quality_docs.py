"""The page of tables: the records' numbers, shares against the right controls, reasons, goals, plots."""

from pathlib import Path

import pytest
from measured import BASE, BUDGET, loss, write_row

from benchmarks.quality import figures
from benchmarks.quality.goals import goals
from benchmarks.quality.reasons import better_rows, differences, reasons
from benchmarks.quality.records import change_record
from benchmarks.quality.report import quality_text, write_docs
from benchmarks.quality.results import Number, Results
from benchmarks.quality.rows import ROWS, RowSpec, controls

ROOT = Path(__file__).parents[2]


def test_shares_are_taken_against_controls_of_the_same_seed(folder):
    results = Results(folder / "quick.jsonl")
    assert results.past("recommended") == Number(pytest.approx(3.11), pytest.approx(0.01414, rel=1e-3), 2)
    assert results.share("recommended").mean == pytest.approx((0.3 + 0.28) / 2 / 0.4)
    assert results.share("teacher") is None and results.past("nothing") is None
    assert results.past("recommended").text() == "3.110 ± 0.014" and results.past("gate-none").text(1) == "3.3"
    assert results.share("gate-none").text(0, percent=True) == "25%"


def test_a_row_from_before_its_preset_changed_keeps_its_control(folder):
    write_row(folder, controls(BASE, BUDGET)["control"], 3.3)
    write_row(folder, RowSpec(name="longer-x4"), 3.1)  # of the preset "plain" as BASE is
    config = BASE.config(BUDGET, 2).to_dict()
    change_record(folder / "quick.jsonl", "longer-x4.s0", lambda record: record["settings"].update(config=config))
    assert Results(folder / "quick.jsonl").share("longer-x4").mean == pytest.approx(0.2 / 0.3)


def test_wide_rows_stand_beside_both_controls(folder):
    row = ROWS["recommended-wide-4x1024"].spec(range(30), 30)
    write_row(folder, row, 3.06)
    write_row(folder, controls(row, BUDGET)["control"], 3.2)
    results = Results(folder / "quick.jsonl")
    own, control = results.share(row.name), controls(row, BUDGET)["control"].name
    assert own.mean == pytest.approx(0.14 / 0.2) and results.narrow_share(row.name).mean == pytest.approx(0.34 / 0.4)
    assert results.share(control) is None and results.narrow_share(control).mean == pytest.approx(0.2 / 0.4)
    assert results.narrow_share("recommended") == results.share("recommended")
    page = quality_text(folder, folder, "figures")
    assert "| recommended-wide-4x1024 | 3.060 | 85% | 70% |" in page and f"| {control} | 3.200 | 50% |  |" in page
    assert "| 17.2 |" in page and "| 27.7 |" in page  # MiB of a sequence


def test_of_many_hybrids_the_best_is_drawn(folder):
    for name, value in (("recommended-wide-4x1024", 3.2), ("recommended-wide-8x1024", 3.1), ("stage2-wide", 2.9)):
        write_row(folder, RowSpec(name=name), value)
    write_row(folder, RowSpec(name="recommended-softmax-25"), 3.05)
    write_row(folder, RowSpec(name="recommended-softmax-25-passkeys"), 2.8)
    results = Results(folder / "quick.jsonl")
    control = controls(RowSpec(name="recommended"), BUDGET)["control"].name
    drawn = figures._drawn(results, [*results.records], "loss")
    wanted = {"teacher", control, "plain", "recommended", "recommended-wide-8x1024", "recommended-softmax-25"}
    assert set(drawn) == wanted


def test_rows_with_teachers_of_their_own_are_compared_above_them(folder):
    """Cross-entropy moves teacher and student toward the text alike."""
    row = ROWS["stage2-ce"].spec(None, 30)
    write_row(folder, row, 2.6)
    assert Results(folder / "quick.jsonl").beside("stage2-ce", "base") is None
    write_row(folder, controls(row, BUDGET)["teacher"], 2.4)
    results = Results(folder / "quick.jsonl")
    assert results.beside("stage2-ce", "base") == pytest.approx(0.2 - 0.11)
    assert results.beside("gate-none", "base") == pytest.approx(3.3 - 3.11)
    assert results.beside("nothing", "base") is None
    assert differences(results, "stage2.kl_weight")["stage2-ce"][0] == pytest.approx(0.09)


def test_hybrids_have_a_goal_however_they_were_trained(folder):
    for name, found in (("recommended-softmax-25", 0.5), ("recommended-softmax-25-passkeys", 1.0)):
        write_row(folder, RowSpec(name=name), 3.0, passkey={"1024": found, "8192": found})
    lines = [line for line in goals(Results(folder / "quick.jsonl")).splitlines() if "passkey" in line]
    assert len(lines) == 4 and sum("**no**" in line for line in lines) == 2
    assert all("passkeys`" in line for line in lines if "**no**" not in line)


def test_passkeys_that_were_asked_for_with_a_space_are_told_so(folder, tmp_path):
    write_row(folder, RowSpec(name="recommended-softmax-25"), 3.0, passkey_and_space={"1024": 0.5, "8192": 0.5})
    write_row(folder, RowSpec(name="plain"), 3.1, passkey_and_space={"1024": 0.3})
    results = Results(folder / "quick.jsonl")
    lines = [line for line in goals(results).splitlines() if "passkey" in line]
    assert len(lines) == 2 and all("one passkey (and the space before it) up to" in line for line in lines)
    _, told = quality_text(folder, tmp_path, "figures").split("**Passkey, one key, and the space before it")
    assert "| plain | 30% |" in told


def test_reasons_cite_the_rows_and_say_what_the_tables_would_choose(folder):
    results = Results(folder / "quick.jsonl")
    changes = differences(results, "attention.gate")
    assert changes["gate-none"][0] == pytest.approx(0.19) and changes["gate-none"][1] == pytest.approx(0.0283, rel=1e-2)
    # a larger state does not count, and the rate of stage2-lr-1e-3 is what recommended has
    assert better_rows(results) == {"attention.gate": ["gate-scalar"]}
    assert "| `stage2.learning_rate` | `0.001` | `stage2-lr-1e-3` -0.110" in reasons(results)
    assert "changed, `0.0005` before" in reasons(results)
    text = reasons(results)
    assert "`gate-none` +0.190" in text and "`gate-scalar` is better" in text and "`attention.feature_dim`" in text


def test_the_page_is_written_whole_and_the_same_again(folder, tmp_path):
    page, plots = tmp_path / "results" / "TABLES.md", tmp_path / "docs" / "figures"
    write_docs(page, plots, folder)
    once = page.read_text()
    assert (
        once.startswith("# Tables of quality\n")
        and once.endswith("\n")
        and "](../docs/figures/quality-mqar.png)" in once
    )
    cells = ["| recommended | 4.000 ± 0.000 | 3.110 ± 0.014 |", "72 ± 4%", "a chip, torch 1", "abcdef012345", "50.0%"]
    cells += [
        "61.0% (error 1.0)",
        "2 ties",
        "1 (0.0300), 0 (0.0100)",
        "[4K, 64K)",
        "Table 4, A7",
        "| 5.000 |",
        "| gate-none | no decay | 3.300 | +0.190 (base) | 25% |",
        "hybrid 50.0%, above its linear branch alone (25.0%); above it in 1 of 1 seeds",
    ]
    for cell in cells:
        assert cell in once, cell
    shown = {path.name for path in plots.iterdir()}
    assert shown >= {"quality-quick-loss.png", "quality-mqar.png"} and all(name in once for name in shown)
    page.write_text("something else")
    write_docs(page, plots, folder)
    assert page.read_text() == once and "NaN" not in once


def test_the_page_in_the_repository_is_what_the_command_writes(tmp_path, monkeypatch):
    # Which plots there are and what the page says of them: rendering them is most of the time, and tested above.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **options: Path(path).touch())
    results = ROOT / "benchmarks" / "results"
    write_docs(tmp_path / "benchmarks" / "results" / "TABLES.md", tmp_path / "docs" / "figures", results / "quality")
    written = (tmp_path / "benchmarks" / "results" / "TABLES.md").read_text()
    assert (results / "TABLES.md").read_text() == written, "run `python -m benchmarks.quality docs`"
    plots = {path.name for path in (tmp_path / "docs" / "figures").iterdir()}
    assert {path.name for path in (ROOT / "docs" / "figures").glob("quality-*")} == plots


def test_rows_that_are_not_declared_are_not_read(folder):
    """Their options may be retired, so that no configuration can be made of them."""
    before = quality_text(folder, folder, "figures")
    write_row(folder, RowSpec(name="memory-delta"), 2.0)
    retired = {"attention": {"memory": "delta", "nonsense": 1}}
    change_record(folder / "quick.jsonl", "memory-delta.s0", lambda record: record["settings"].update(config=retired))
    assert quality_text(folder, folder, "figures") == before
    assert "memory-delta" not in Results(folder / "quick.jsonl").records


def test_goals_are_held_against_the_rows(folder):
    text = goals(Results(folder / "quick.jsonl"))
    assert "| share recovered past 2048 | at least 75% | 72 ± 4% | **no** |" in text
    assert "| loss at 0 to 128 above the teacher trained alike | at most 0.010 | 0.000 ± 0.000 | yes |" in text
    assert "piqa" not in text and "passkey" not in text  # neither the teacher's tasks nor a hybrid was measured
    tasks = {"metrics": {"piqa": {"acc_norm": 0.62}}}
    write_row(folder, RowSpec(name="teacher", preset="teacher", stage1=False, stage2=False), 3.0, tasks=tasks)
    long = loss(3.3, (0, 128, 2048, 4096, 16_384, 65_536))
    long["means"][-1] = 3.34
    write_row(folder, RowSpec(name="recommended", seed=1), 3.12, length=long)
    write_row(
        folder,
        RowSpec(name="recommended-softmax-25"),
        3.05,
        passkey={"256": 1.0, "1024": 1.0, "8192": 0.85, "16384": 0.1},
    )
    text = goals(Results(folder / "quick.jsonl"))
    assert "| piqa beside the teacher | at least 99% | 98.4% | **no** |" in text
    assert "| loss from 16,384 on above that at 2048 to 4096 | at most 0.030 | 0.040 | **no** |" in text
    assert (
        "| one passkey up to 1024 tokens, `recommended-softmax-25` | at least 100% | 100% at the worst length | yes |"
        in text
    )
    assert (
        "| one passkey up to 8192 tokens, `recommended-softmax-25` | at least 90% | 85% at the worst length | **no** |"
        in text
    )
