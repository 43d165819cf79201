"""Records of other machines are put among those that are here without losing what either has."""

import copy
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.quality.__main__ import app
from benchmarks.quality.bench import Bench
from benchmarks.quality.merge import merge
from benchmarks.quality.options import read_budget
from benchmarks.quality.records import merge_records, read_records
from benchmarks.quality.rows import RowSpec

SPEC = RowSpec(name="plain", preset="plain")


def record(measures, **more):
    bench = Bench(teacher="t", data=["a"], eval_data=["b"], budget=read_budget("quick"), out=Path("o"), work=Path("w"))
    return {
        "settings": bench.settings(SPEC, 2),
        "measures": measures,
        "stages": {"stage1": {"seconds": 1.0}},
        "hashes": {},
        **more,
    }


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results" / "quick.jsonl"
    before = record({"loss": 3.0, "kl": 0.1, "found": 0.5}, trials={"found": 100}, seconds=1.0)
    merge_records(path, {"plain.s0": before, "other.s0": record({"loss": 4.0})})
    return path


def come(tmp_path, new, name="new.jsonl"):
    merge_records(tmp_path / name, {"plain.s0": new})
    return tmp_path / name


def test_measures_are_added_to_the_row_that_is_there(results, tmp_path):
    new = record({"length": 2.0, "kl": 0.2}, hashes={"length": "sum"})
    assert merge(results, [come(tmp_path, new)]) == {"plain.s0": ["length", "kl"]}
    there = read_records(results)
    assert there["plain.s0"]["measures"] == {"loss": 3.0, "kl": 0.2, "found": 0.5, "length": 2.0}
    assert there["plain.s0"]["hashes"] == {"length": "sum"} and "earlier" not in there["plain.s0"]
    assert there["other.s0"]["measures"] == {"loss": 4.0}


def test_shares_of_fewer_prompts_take_no_place(results, tmp_path):
    fewer = record({"found": 0.9}, trials={"found": 20})
    assert merge(results, [come(tmp_path, fewer)]) == {"plain.s0": []}
    more = record({"found": 0.6}, trials={"found": 200})
    assert merge(results, [come(tmp_path, more, "more.jsonl")]) == {"plain.s0": ["found"]}
    there = read_records(results)["plain.s0"]
    assert there["measures"]["found"] == 0.6 and there["trials"] == {"found": 200}


def test_what_an_earlier_training_measured_is_named(results, tmp_path):
    again = record({"loss": 2.9}, seconds=5.0, scores="of the new")
    again["stages"]["stage1"]["seconds"] = 2.0
    merge(results, [come(tmp_path, again)])
    there = read_records(results)["plain.s0"]
    assert there["earlier"] == ["kl", "found"] and there["stages"]["stage1"]["seconds"] == 2.0
    assert there["seconds"] == 5.0 and there["scores"] == "of the new" and there["trials"] == {"found": 100}


def test_a_row_of_other_settings_is_refused_whole_or_taken_whole(results, tmp_path):
    other = copy.deepcopy(record({"loss": 1.0}))
    other["settings"]["config"]["attention"]["window"] = 64
    path = come(tmp_path, other)
    merge_records(path, {"new.s0": record({"loss": 5.0})})
    before = results.read_text()
    with pytest.raises(ValueError, match="plain.s0 is in .* with other settings"):
        merge(results, [path])
    assert results.read_text() == before
    merge(results, [path], replace=True)
    there = read_records(results)
    assert there["plain.s0"]["measures"] == {"loss": 1.0} and "new.s0" in there


def test_what_is_measured_again_is_of_the_model_that_is_there(results, tmp_path):
    again = record({"loss": 2.9})
    again["stages"]["stage1"]["seconds"] = 2.0
    merge(results, [come(tmp_path, again)])
    merge(
        results, [come(tmp_path, again | {"measures": {"kl": 0.3, "length": 1.0}, "earlier": ["length"]}, "kl.jsonl")]
    )
    assert read_records(results)["plain.s0"]["earlier"] == ["found", "length"]
    nothing = record({"found": 0.9}, trials={"found": 20})
    before = results.read_text()
    assert merge(results, [come(tmp_path, nothing, "fewer.jsonl")]) == {"plain.s0": []}
    assert results.read_text() == before  # not the stages of a model of which nothing was taken


def test_other_texts_and_two_new_rows_of_one_name_are_refused(results, tmp_path):
    merge(results, [come(tmp_path, record({"length": 1.0}, hashes={"length": "a"}))])
    with pytest.raises(ValueError, match="measured on other texts"):
        merge(results, [come(tmp_path, record({"length": 2.0}, hashes={"length": "b"}), "b.jsonl")])
    other = copy.deepcopy(record({"loss": 1.0}))
    other["settings"]["config"]["attention"]["window"] = 64
    with pytest.raises(ValueError, match="in a file before, with other settings"):
        merge(
            tmp_path / "empty.jsonl",
            [come(tmp_path, record({"loss": 3.0}), "c.jsonl"), come(tmp_path, other, "d.jsonl")],
        )
    assert not (tmp_path / "empty.jsonl").exists()


def test_a_row_under_way_and_a_row_that_is_new(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record({"loss": 3.0})))
    called = CliRunner().invoke(app, ["merge", str(path), "--out", str(tmp_path)])
    assert called.exit_code == 0 and "plain.s0: loss" in called.output
    assert list(read_records(tmp_path / "quick.jsonl")) == ["plain.s0"]


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_what_is_no_record_is_refused_by_name(tmp_path, content):
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match="record"):
        merge(tmp_path / "quick.jsonl", [path])
