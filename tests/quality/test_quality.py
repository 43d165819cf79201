"""The bench's rows: what they are, that they train, measure, resume, and keep to their time."""

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from readable import byte_tokenizer, save_teacher, save_texts
from rich.console import Console
from tiny import FAMILIES, student, teacher, tokens, windows

from benchmarks.quality import runner as runner_module
from benchmarks.quality import worker
from benchmarks.quality.bench import Bench
from benchmarks.quality.branches import switched_off
from benchmarks.quality.records import merge_records, read_record
from benchmarks.quality.retrieval_data import WithPasskeys
from benchmarks.quality.rows import BUDGETS, ROWS, TABLES, Budget, RowSpec, controls, rows_of
from benchmarks.quality.rows.find import find_rows
from benchmarks.quality.runner import Runner
from benchmarks.quality.selection import layer_order
from benchmarks.quality.worker import run_row
from lizard_models import LizardConfig
from lizard_models.evaluation import divergence_by_position, loss_by_position
from lizard_models.evaluation.restoration import restoration_savings, restored
from lizard_models.teachers.loading import load_model
from lizard_models.text.sequences import PackedTokens

TINY = Budget(name="tiny", stage1_steps=2, stage2_steps=2, batch_size=2, sequence_length=48)
LAYERS = 30


def test_every_row_of_every_table_is_a_sound_configuration():
    for name in TABLES:
        rows = find_rows([name], [0], BUDGETS["full"], order=range(LAYERS), layers=LAYERS)
        assert len({row.stem for row in rows}) == len(rows)
        for row in rows:
            config = row.config(BUDGETS["full"], LAYERS)
            assert config.stage1.max_steps == 1221 and config.stage2.sequence_length == 2048 * row.longer
            assert config.stage2.batch_size * row.longer == 8
            assert "/" not in row.stem


def test_every_ablation_changes_something():
    budget = BUDGETS["quick"]
    base = ROWS["base"].spec(None, LAYERS).config(budget, LAYERS)
    for declared in ROWS.values():
        row = declared.spec(range(LAYERS), LAYERS)
        if row.name not in ("base", "no-stage1", "no-stage2") and not row.passkeys:
            assert row.config(budget, LAYERS) != base, row.name
    specs = [row.spec(None, LAYERS) for row in rows_of("parts")]
    stages = {row.name: (row.stage1, row.stage2) for row in specs}
    assert stages["no-stage1"] == (False, True) and stages["no-stage2"] == (True, False)


def test_a_row_is_compared_with_a_control_and_a_teacher_trained_as_it_was():
    paper = controls(RowSpec(name="paper", preset="paper", seed=3), BUDGETS["quick"])
    assert paper["teacher"].name == "teacher-ce-qkv-r8-5e-04" and paper["teacher"].seed == 3
    config = paper["control"].config(BUDGETS["quick"], LAYERS)
    wanted = LizardConfig.preset("paper").stage2
    assert not config.attention.linear_branch and config.attention.window == 128 and not paper["control"].stage1
    assert config.stage2.lora_targets == wanted.lora_targets and config.stage2.learning_rate == wanted.learning_rate
    assert config.stage2.cross_entropy_weight == 1 and config.stage2.kl_weight == 0
    alike = paper["teacher"].config(BUDGETS["quick"], LAYERS)
    assert alike.softmax_layers == tuple(range(LAYERS)) and alike.stage2.max_steps == 150

    distilled = controls(RowSpec(name="plain", seed=3), BUDGETS["quick"])
    assert distilled["teacher"] == RowSpec(name="teacher", preset="teacher", stage1=False, stage2=False)
    assert distilled["control"].config(BUDGETS["quick"], LAYERS).stage2.kl_weight == 1
    longer = controls(RowSpec(name="longer", longer=4), BUDGETS["quick"])["control"]
    assert longer.name.endswith("-longer-x4") and longer.config(BUDGETS["quick"], LAYERS).stage2.sequence_length == 4096
    untrained = controls(RowSpec(name="no-stage2", stage2=False, seed=3), BUDGETS["quick"])
    assert untrained["control"].name == "control-w128" and not untrained["control"].stage2


def test_rows_are_found_by_table_and_name_once_a_seed():
    rows = find_rows(["recommended", "gates"], [0, 1], BUDGETS["quick"], order=None, layers=LAYERS)
    names = [row.stem for row in rows]
    assert len(names) == len(set(names)) and names[0] == "teacher.s0" and "teacher.s1" not in names
    assert {"recommended.s0", "recommended.s1", "gate-none.s1", "control-w128-kl-qkvo-r8-5e-04.s1"} <= set(names)
    alone = find_rows(["control-w128-kl-qkvo-r8-5e-04"], [2], BUDGETS["quick"], order=None, layers=LAYERS)
    assert [row.stem for row in alone] == ["control-w128-kl-qkvo-r8-5e-04.s2"] and alone[0].preset == "window_only"
    with pytest.raises(ValueError, match="which layers save most KL is not measured yet"):
        find_rows(["softmax-25"], [0], BUDGETS["quick"], order=None, layers=LAYERS)
    with pytest.raises(ValueError, match="no table or row 'nonsense'"):
        find_rows(["nonsense"], [0], BUDGETS["quick"], order=None, layers=LAYERS)
    kept = find_rows(["softmax"], [0], BUDGETS["quick"], order=list(range(29, -1, -1)), layers=LAYERS)
    layers = {row.name: row.changes["softmax_layers"] for row in kept if row.name.startswith("softmax")}
    assert layers["softmax-12.5"] == [26, 27, 28, 29] and layers["softmax-12.5-uniform"] == [3, 11, 18, 26]
    assert [len(layers[f"softmax-{p}"]) for p in ("12.5", "25", "50")] == [4, 8, 15]


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quality")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts", characters=1500)
    return folder


def bench(places: Path, **changes) -> Bench:
    return Bench(
        **{
            "teacher": str(places / "teacher"),
            "data": [str(places / "texts")],
            "eval_data": [str(places / "texts")],
            "budget": TINY,
            "out": places / "results",
            "work": places / "work",
            "eval_length": 200,
            "eval_documents": 2,
            "long_length": 400,
            "passkey_lengths": [700],
            "passkey_trials": 2,
            **changes,
        }
    )


def test_a_row_trains_measures_and_is_added_to_without_training(places):
    spec = RowSpec(name="plain", changes={"attention": {"window": 16}})
    first = bench(places, measures=["loss", "kl", "branches", "restore"])
    assert first.missing(spec, 3) == ["loss", "kl", "branches", "restore"] and layer_order(first) is None
    record = run_row(spec, first, lambda message: None)
    saved = json.loads(first.draft_path(spec).read_text())
    assert saved["measures"].keys() == {"loss", "kl", "branches", "restore"}
    assert saved["stages"]["stage1"]["steps"] == 2 and saved["stages"]["stage2"]["final_loss"] > 0
    assert saved["settings"]["config"]["attention"]["window"] == 16 and saved["settings"]["row"]["seed"] == 0
    assert {"stage1", "stage2", "validation"} <= saved["hashes"].keys() and saved["environment"]["dtype"] == "float32"
    assert len(saved["after_stage1"]["layer_errors"]) == 3
    assert sorted(layer_order(first)) == [0, 1, 2] == sorted(map(int, saved["measures"]["restore"]["saved"]))
    assert saved["measures"]["loss"]["means"] == pytest.approx(record["measures"]["loss"]["means"])
    assert first.missing(spec, 3) == [] and not first.results.exists()
    runner = Runner(first, Console(file=open("/dev/null", "w")), gpus=[], jobs_per_gpu=1, minutes=None)
    assert runner.run([spec]) == {"plain.s0": "finished"}  # as if an earlier one had been killed before merging
    assert not first.draft_path(spec).exists() and read_record(first.results, spec.stem) == saved
    assert first.missing(spec, 3) == [] and sorted(layer_order(first)) == [0, 1, 2]
    assert layer_order(dataclasses.replace(first, teacher="another")) is None

    more = bench(places, measures=["loss", "length", "passkey", "passkeys5"])
    assert more.missing(spec, 3) == ["length", "passkey", "passkeys5"]
    said: list[str] = []
    record = run_row(spec, more, said.append)
    assert any("trained before" in line for line in said)
    assert record["measures"]["passkey"] == {"700": 0.0} and record["measures"]["length"]["edges"][-1] == 400
    assert record["measures"]["loss"] == saved["measures"]["loss"]
    assert record["trials"] == dict.fromkeys(("passkey", "passkeys5"), more.passkey_trials)
    assert more.missing(spec, 3) == []
    asked = dataclasses.replace(more, passkey_trials=more.passkey_trials + 1)
    assert asked.missing(spec, 3) == ["passkey", "passkeys5"]
    again = RowSpec(name="plain", preset="window_only", changes={"attention": {"window": 16, "linear_branch": True}})
    assert more.missing(again, 3) == []  # the same configuration said otherwise
    changed = RowSpec(name="plain", changes={"attention": {"window": 8}})
    assert more.record(changed, 3) is None and "loss" in more.missing(changed, 3)
    more.publish(changed, 3)  # another row's settings: what is under way is not theirs
    assert "length" not in read_record(more.results, spec.stem)["measures"]
    more.publish(spec, 3)
    older = read_record(more.results, spec.stem)
    assert older["measures"]["length"]["means"] == [*record["measures"]["length"]["means"]]
    del older["settings"]["row"]["passkeys"], older["settings"]["config"]["attention"]["gate_rank"]
    merge_records(more.results, {spec.stem: older})  # as written before these fields existed
    assert more.missing(spec, 3) == []
    older["settings"]["config"]["attention"]["nonsense"] = 1
    merge_records(more.results, {spec.stem: older})
    assert more.record(spec, 3) is None
    with pytest.raises(ValueError, match="measures: no nonsense"):
        bench(places, measures=["nonsense"])


def test_stage_3_goes_on_with_stage_2_and_tells_what_it_gains(places):
    """A row as declared: a quarter of stage 2's tokens again, four times as long or as long; two steps of its own."""
    full = BUDGETS["full"]
    longer, same = (ROWS[f"recommended-stage3{end}"].spec(None, LAYERS) for end in ("", "-same-length"))
    without = RowSpec(name="recommended", preset="recommended").config(full, LAYERS)
    for spec, length, batch in ((longer, 8192, 1), (same, 2048, 4)):
        config = spec.config(full, LAYERS)
        assert (config.stage3.sequence_length, config.stage3.batch_size) == (length, batch)
        assert config.stage3.max_steps * length * batch == pytest.approx(full.tokens[1] / 4, rel=0.01)
        assert config.replace(stage3=without.to_dict()["stage3"]) == without
    row = {"name": "longer", "changes": {"attention": {"window": 16}}, "stage3": 2.0}
    spec = RowSpec(**row, stage3_longer=2)
    config = spec.config(TINY, 3)
    assert (config.stage3.max_steps, config.stage3.sequence_length, config.stage3.batch_size) == (2, 96, 2)
    plan = bench(places, measures=["loss"])
    record = run_row(spec, plan, lambda message: None)
    assert [*record["stages"]] == ["stage1", "stage2", "stage3"] and record["stages"]["stage3"]["steps"] == 2
    assert record["after_stage2"]["loss"]["means"] != record["measures"]["loss"]["means"]
    assert record["hashes"]["stage3"] != record["hashes"]["stage2"]
    alone = run_row(RowSpec(name="not-longer", changes=row["changes"]), plan, lambda message: None)
    assert alone["measures"]["loss"]["means"] == pytest.approx(record["after_stage2"]["loss"]["means"], rel=1e-5)
    assert plan.missing(spec, 3) == [] and plan.missing(RowSpec(**row, stage3_longer=1), 3) == ["loss"]


def test_widened_layers_get_their_window_after_stage_1(places, monkeypatch):
    seen, train = [], worker.train_stage1

    def watched(model, *rest):
        seen.append(windows(model))
        return train(model, *rest)

    monkeypatch.setattr(worker, "train_stage1", watched)
    changes = {"attention": {"window": 16}, "wide_layers": [1], "wide_window": 40}
    rows = [RowSpec(name=f"wide-{late}", changes=changes, widened=late) for late in (False, True)]
    records = [run_row(row, bench(places, measures=["loss"]), lambda message: None) for row in rows]
    assert seen == [[16, 40, 16], [16, 16, 16]]
    assert records[0]["settings"]["config"] == records[1]["settings"]["config"]
    finished = [load_model(str(places / "work" / "tiny" / row.stem / "model")).model for row in rows]
    assert [windows(model) for model in finished] == [[16, 40, 16]] * 2
    found = [bench(places).record(row, 3) for row in rows]
    assert all(found) and found[0] != found[1] and found[0] != records[1]
    controlled = [controls(row, TINY)["control"] for row in rows]
    assert controlled[0] == controlled[1] and not controlled[0].widened


def test_the_teacher_is_fine_tuned_alike_and_the_untrained_one_is_the_reference(places):
    plan = bench(places, measures=["loss", "kl"])
    reference, alike = (
        RowSpec(name="teacher", preset="teacher", stage1=False, stage2=False),
        RowSpec(
            name="teacher-ce",
            preset="teacher",
            stage1=False,
            changes={"stage2": {"cross_entropy_weight": 1.0, "kl_weight": 0}},
        ),
    )
    plain = run_row(reference, plan, lambda message: None)
    tuned = run_row(alike, plan, lambda message: None)
    assert "kl" not in plain["measures"] and tuned["measures"]["kl"]["means"][0] > 0
    assert tuned["measures"]["loss"]["means"] != plain["measures"]["loss"]["means"]


class FakeWorker:
    """Finishes rows at once, fails those whose name says so, never finishes those that are slow."""

    log = Path("log")

    def __init__(self, slot, gpu, threads, log):
        self.row, self.started, self.estimate, self.process = None, 0.0, 0.0, self
        self.stdin, self.returncode = None, 0

    def give(self, row, bench, estimate):
        self.row, self.estimate, self.started = row, estimate, time.monotonic()

    def answer(self):
        if "slow" in self.row.name:
            return None
        return {"fate": "failed" if "bad" in self.row.name else "finished", "message": "why"}

    def poll(self):
        return None

    def send_signal(self, number):
        self.stopped = number

    def wait(self, timeout=None):
        return 0


def test_the_runner_survives_failures_and_starts_nothing_it_cannot_finish(places, monkeypatch):
    monkeypatch.setattr(runner_module, "_Worker", FakeWorker)
    console = Console(file=open("/dev/null", "w"))
    plan = bench(places, out=places / "fake")
    rows = [RowSpec(name=name) for name in ("a", "bad", "b")]
    fates = Runner(plan, console, gpus=[0, 1], jobs_per_gpu=1, minutes=10).run(rows)
    assert fates == {"a.s0": "finished", "bad.s0": "failed", "b.s0": "finished"}
    assert Runner(plan, console, gpus=[], jobs_per_gpu=2, minutes=0.1).run(rows[:1]) == {"a.s0": "not started"}
    hurried = Runner(plan, console, gpus=[], jobs_per_gpu=1, minutes=0.001)
    hurried._fits = lambda row: True
    assert hurried.run([RowSpec(name="slow")]) == {"slow.s0": "stopped"}


@pytest.mark.parametrize("preset", ["plain", "paper"])
def test_a_branch_switched_off_leaves_the_other(preset):
    model, ids = student(preset), tokens(2, 60)
    with torch.no_grad():
        whole = model(ids).logits
        with switched_off(model, "linear"):
            window = model(ids).logits
        with switched_off(model, "window"):
            linear = model(ids).logits
        assert torch.equal(model(ids).logits, whole)
    assert not torch.allclose(window, whole) and not torch.allclose(linear, whole)
    if preset == "plain":  # up to the window there is nothing else, and past it the control has the same formula
        control = student("window_only", seed=None)
        with torch.no_grad():
            torch.testing.assert_close(window, control(ids).logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(linear[:, :12], whole[:, :12], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no linear branch"), switched_off(student("window_only"), "linear"):
        pass


def test_restoring_every_layer_restores_the_teacher():
    model, reference, ids = student(), teacher(), tokens(2, 61)
    with torch.no_grad(), restored(model, [0, 1, 2]):
        torch.testing.assert_close(model(ids, use_cache=False).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)
    measured = restoration_savings(model, reference, ids)
    kl = divergence_by_position(model, reference, ids)
    assert measured["kl"] == pytest.approx(kl.past(0)) and measured["kl"] > 0
    with restored(model, [1]):
        saved = kl.past(0) - divergence_by_position(model, reference, ids).past(0)
    assert measured["saved"][1] == pytest.approx(saved, rel=1e-4)
    assert measured["order"] == sorted(measured["saved"], key=lambda layer: -measured["saved"][layer])
    with pytest.raises(ValueError, match=r"layers \[7\] are not converted"), restored(model, [7]):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_savings_are_those_of_whole_forwards(family):
    model, reference, ids = student(family=family), teacher(family=family), tokens(3, 61)
    kept = model.model.layers[0].forward = model.model.layers[0].forward  # as hooks of other libraries put it there
    whole = divergence_by_position(model, reference, ids).past(0)
    measured = restoration_savings(model, reference, ids, batch_size=2)
    assert measured["kl"] == pytest.approx(whole)
    for layer, saved in measured["saved"].items():
        with restored(model, [layer]):
            alone = divergence_by_position(model, reference, ids).past(0)
        assert saved == pytest.approx(whole - alone, rel=1e-3, abs=1e-6)
    assert model.model.layers[0].__dict__["forward"] is kept and "forward" not in model.model.layers[1].__dict__


def test_divergence_is_the_kl_from_teacher_to_model():
    model, reference, ids = student(), teacher(), tokens(3, 131)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(ids).logits[:, :-1], -1) for m in (reference, model))
    kl = (p.exp() * (p - q)).sum(-1)
    measured = divergence_by_position(model, reference, ids, batch_size=2)
    assert measured.edges == (0, 128, 130)
    assert measured.means == pytest.approx((kl[:, :128].mean().item(), kl[:, 128:].mean().item()), rel=1e-4)
    assert divergence_by_position(reference, reference, ids).means == pytest.approx((0.0, 0.0), abs=1e-6)
    assert math.isfinite(loss_by_position(model, ids).past(128))


def test_passkeys_among_the_text_fill_their_sequences():
    tokenizer = byte_tokenizer()
    text = PackedTokens(np.arange(5000, dtype=np.uint16) % 97, 800)
    mixed = WithPasskeys(text, tokenizer, 3)
    assert len(mixed) == len(text) + 3 and mixed.digest != text.digest
    assert torch.equal(mixed[0]["input_ids"], text[0]["input_ids"])
    shown = tokenizer.decode(mixed[len(text) + 1]["input_ids"])
    assert len(mixed[len(text)]["input_ids"]) == 800 and shown.count("Keep it in mind") == 5
    owner, key = shown.rsplit("The pass key of the ", 1)[1].split(" is ")
    assert f"The pass key of the {owner} is {key}. Keep it in mind" in shown and 5 <= len(key) <= 8
    assert mixed.digest == WithPasskeys(text, tokenizer, 3).digest != WithPasskeys(text, tokenizer, 3, seed=1).digest
    beside = controls(RowSpec(name="x", preset="paper", passkeys=3), BUDGETS["quick"])
    assert all(row.passkeys == 3 and row.name.endswith("-passkeys3") for row in beside.values())
