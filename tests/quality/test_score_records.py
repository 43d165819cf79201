"""Scores of kept keys are those of a row's own stage 0, or of a recorded row whose stage 0 is the same."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from measured import tiny_plan

from benchmarks.quality.bench import Bench
from benchmarks.quality.records import merge_records, read_records
from benchmarks.quality.rows import Budget, RowSpec
from benchmarks.quality.scores import TOLD, strays
from benchmarks.quality.worker import run_row
from lizard_models.files.weights import content_digest
from lizard_models.teachers.loading import load_model

ROOT = Path(__file__).parents[2]
TINY = Budget(name="tiny", stage1_steps=1, stage2_steps=1, batch_size=2, sequence_length=48, stage0_steps=1)
STAGE0 = {"sequence_length": 160, "label_queries": 32}


def row(name: str, places: int, window: int = 16, **stage0) -> RowSpec:
    changes = {"attention": {"window": window, "kept_keys": places}, "stage0": STAGE0 | stage0}
    return RowSpec(name=name, changes=changes)


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Bench:
    return tiny_plan(tmp_path_factory.mktemp("score-records"), TINY, measures=["loss"], eval_length=100)


@pytest.fixture(scope="module")
def told() -> list[str]:
    """What the rows said."""
    return []


@pytest.fixture(scope="module")
def records(plan, told) -> dict:
    """Two rows of one stage 0, one that shares its places out after it, and one with another window."""
    rows = (row("first", 8), row("second", 4), row("even", 8, share_places=True), row("other", 8, window=20))
    made = {spec.stem: run_row(spec, plan, told.append) for spec in rows}
    return json.loads(json.dumps(made))


@pytest.mark.parametrize("budget", ["quick", "full"])
def test_no_recorded_row_has_scores_from_elsewhere(budget):
    assert strays(read_records(ROOT / "benchmarks" / "results" / "quality" / f"{budget}.jsonl")) == []


def test_rows_with_the_same_stage_0_share_it(plan, records, told):
    first, second, _, other = records.values()
    assert "second.s0: scores are those of first.s0" in told
    assert not (plan.folder(row("second", 4)) / "stage0").exists() and "other.s0: scores" not in "".join(told)
    assert second["stages"]["stage0"] == first["stages"]["stage0"] and other["stages"]["stage0"]["row"] == "other.s0"
    models = [load_model(str(plan.folder(row(name, 8)) / "model")).model for name in ("first", "second")]
    one, same = (model.key_scores().state_dict() for model in models)
    assert one.keys() == same.keys() and all(torch.equal(one[name], same[name]) for name in one)


def test_rows_of_one_stage_0_tell_one_sum_and_end_with_it(plan, records):
    assert strays(records) == []
    first, second, even, other = records.values()
    assert first["scores"] == first["stages"]["stage0"]["sum"] == second["scores"]
    for name in ("of", "sum", "row"):
        assert first["stages"]["stage0"][name] == even["stages"]["stage0"][name] != other["stages"]["stage0"][name]
    saved = load_model(str(plan.folder(row("second", 4)) / "model")).model
    assert content_digest(dict(saved.key_scores().named_parameters()), {}) == second["scores"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("first.s0"), "second.s0: its scores are those of first.s0, which is not recorded"),
        (lambda r: r["second.s0"]["stages"]["stage0"].update(row="other.s0"), "of other.s0, whose stage 0 is another"),
        (lambda r: r["second.s0"]["hashes"].update(stage0="0" * 64), "of first.s0, whose stage 0 is another"),
        (lambda r: r["second.s0"]["stages"]["stage0"].update(sum="0" * 64), "of first.s0, which has been fitted anew"),
        (lambda r: r["first.s0"]["stages"]["stage0"].update(r2=0.5), "second.s0: its scores are those of first.s0, wh"),
        (lambda r: r["second.s0"].update(scores="0" * 64), "second.s0: ends with other scores than its stage 0 did"),
        (lambda r: r["second.s0"]["stages"].pop("stage0"), "second.s0: has no stage 0, and its budget has one"),
    ],
)
def test_a_record_of_scores_from_elsewhere_is_named(records, change, message):
    changed = copy.deepcopy(records)
    change(changed)
    assert any(message in told for told in strays(changed))


def test_records_from_before_there_were_sums_and_an_oracle_s_pass(records):
    old = copy.deepcopy(records)
    for name in ("first.s0", "second.s0"):
        old[name].pop("scores")
        for mark in ("of", "sum"):
            old[name]["stages"]["stage0"].pop(mark)
    del old["other.s0"]["stages"]["stage0"]
    old["other.s0"]["settings"]["row"]["oracle"] = True
    assert strays(old) == []


def test_a_record_says_which_measures_are_of_an_earlier_training(plan, records):
    assert all("earlier" not in record for record in records.values())
    shutil.rmtree(plan.folder(row("second", 4)))
    merge_records(plan.results, {"second.s0": records["second.s0"]})
    again = run_row(row("second", 4), dataclasses.replace(plan, measures=["loss", "kl"]), lambda message: None)
    assert again["earlier"] == ["loss"] and again["measures"].keys() == {"loss", "kl"}
    assert again["scores"] == records["second.s0"]["scores"]  # the stage 0 that it shares is still there


def test_scores_put_there_by_hand_are_refused(plan, records):
    """The folder of another stage 0 under the name of the one that belongs there, and a model of another run."""
    stages = {mark["stages"]["stage0"]["of"]: mark for mark in records.values()}
    mine, theirs = (plan.work / "stage0" / name for name in stages)
    told = json.loads((mine / TOLD).read_text())
    (mine / TOLD).write_text(json.dumps(told | {"of": theirs.name}))
    with pytest.raises(ValueError, match=r"not those of the stage 0 that belongs here \(of differ\); delete it"):
        run_row(row("third", 2), plan, lambda message: None)
    (mine / TOLD).write_text(json.dumps(told | {"sum": "0" * 64}))
    with pytest.raises(ValueError, match=r"\(sum differ\)"):
        run_row(row("third", 2), plan, lambda message: None)
    (mine / TOLD).write_text(json.dumps(told))
    folder = plan.folder(row("first", 8)) / "model"
    model = load_model(str(folder)).model
    with torch.no_grad():
        next(iter(model.key_scores())).bias += 1e-3
    model.save_pretrained(folder)
    (plan.folder(row("first", 8)) / "record.json").write_text(json.dumps(records["first.s0"] | {"measures": {}}))
    with pytest.raises(ValueError, match="its scores are not those that its record tells of; delete it"):
        run_row(row("first", 8), plan, lambda message: None)
