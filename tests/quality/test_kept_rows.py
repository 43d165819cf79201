"""Rows with kept keys: declared beside the same bytes, trained with a stage 0, measured by keys that are found."""

import copy
import dataclasses
import json

import pytest
import torch
from measured import BUDGET, tiny_plan, write_row
from readable import byte_tokenizer
from tiny import student, teacher, tokens

from benchmarks.quality.bench import Bench
from benchmarks.quality.branches import switched_off
from benchmarks.quality.costs import memory
from benchmarks.quality.records import change_record, merge_records
from benchmarks.quality.report import quality_text
from benchmarks.quality.rows import BUDGETS, ROWS, Budget, RowSpec, controls, rows_of
from benchmarks.quality.rows.find import find_rows
from benchmarks.quality.runner import SCORES, Runner
from benchmarks.quality.worker import run_row
from lizard_models.evaluation import passkey_accuracy, passkeys_found
from lizard_models.evaluation.passkey import passkey_examples
from lizard_models.runs.memory import constant_bytes
from lizard_models.teachers.loading import load_model

TINY = Budget(name="tiny", stage1_steps=1, stage2_steps=1, batch_size=2, sequence_length=48, stage0_steps=2)
CHANGES = {"attention": {"window": 16, "kept_keys": 8}, "stage0": {"sequence_length": 160, "label_queries": 32}}


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Bench:
    return tiny_plan(
        tmp_path_factory.mktemp("kept-rows"), TINY, measures=["loss", "branches", "found"], eval_length=200,
        found_lengths=[500, 700], passkey_trials=2,
    )  # fmt: skip


def test_the_table_has_the_same_bytes_twice():
    names = [row.name for row in rows_of("kept")]
    assert names[0] == "plain" and set(names) >= {"recommended-w640", "recommended-kept-512"}
    for places in (64, 128, 256, 512):
        kept, window = ROWS[f"recommended-kept-{places}"], ROWS[f"recommended-w{128 + places}"]
        assert kept.reference == window.name and memory(window.name) < memory(kept.name) < 1.013 * memory(window.name)
        config = kept.spec(None, 30).config(BUDGET, 30)
        assert config.attention.kept_keys == places and config.attention.window == 128
        assert config.stage0.max_steps == 240 and config.stage0.sequence_length == 4096
        assert controls(kept.spec(None, 30), BUDGET) == controls(RowSpec(name="plain"), BUDGET)
    full = dataclasses.replace(ROWS["recommended-kept-64"].spec(None, 30), seed=2).config(BUDGETS["full"], 30)
    assert full.stage0.max_steps == 240 and full.stage0.seed == 2
    found = [row.name for row in find_rows(["kept"], [0], BUDGET, order=None, layers=30)]
    assert any(name.startswith("control-w640-") for name in found)


def test_a_row_trains_its_scores_and_says_how_they_fit(plan):
    spec = RowSpec(name="kept", changes=CHANGES)
    record = run_row(spec, plan, lambda message: None)
    assert list(record["stages"]) == ["stage0", "stage1", "stage2"]
    scores = record["stages"]["stage0"]
    assert scores["steps"] == 2 and [len(heads) for heads in scores["r2_by_layer"]] == [2, 2, 2]
    assert (
        scores["r2"] == pytest.approx(sum(map(sum, scores["r2_by_layer"])) / 6)
        and len(record["hashes"]["stage0"]) == 64
    )
    assert record["measures"]["found"].keys() == {"filler", "novel"}
    assert record["measures"]["found"]["novel"].keys() == {"500", "700"} and len(record["hashes"]["found"]) == 64
    assert record["measures"]["branches"]["without_linear"]["means"] != record["measures"]["loss"]["means"]
    saved = load_model(str(plan.folder(spec) / "model")).model
    assert [attention.lizard.config.kept_keys for attention in saved.lizard_attentions()] == [8, 8, 8]
    assert all(score.outer_weight.any() for score in saved.key_scores())
    assert plan.missing(spec, 3) == [] and plan.record(spec, 3) is not None
    run = json.loads((plan.folder(spec) / "stage0" / "run.json").read_text())
    assert run["data"] == record["hashes"]["stage0"] and run["recipe"]["label_queries"] == 32
    more = dataclasses.replace(plan, budget=dataclasses.replace(TINY, stage0_steps=3))
    assert more.record(spec, 3) is None  # of other scores
    other = {"attention": CHANGES["attention"], "stage0": CHANGES["stage0"] | {"label_block": 7}}
    assert plan.record(dataclasses.replace(spec, changes=other), 3) is not None  # of the same, made in other blocks
    unscored = dataclasses.replace(plan, budget=dataclasses.replace(TINY, name="unscored", stage0_steps=0),
                                   measures=["loss"])  # fmt: skip
    plain = run_row(spec, unscored, lambda message: None)
    assert list(plain["stages"]) == ["stage1", "stage2"]
    start = load_model(str(unscored.folder(spec) / "model")).model.key_scores()
    assert not any(score.outer_weight.any() for score in start)


def test_text_of_both_stages_may_say_things_again(plan):
    """Which is another text; what is found, and the KL, are asked for after stage 1 too."""
    spec = RowSpec(name="again", changes=CHANGES, look_ups=True)
    plan = dataclasses.replace(plan, measures=["kl", "found"], budget=dataclasses.replace(TINY, sequence_length=512))
    record = run_row(spec, plan, lambda message: None)
    assert record["after_stage1"]["found"].keys() == {"filler", "novel"}
    assert record["after_stage1"]["kl"]["edges"] == record["measures"]["kl"]["edges"]
    assert record["after_stage1"]["kl"]["means"] != record["measures"]["kl"]["means"]
    once = run_row(dataclasses.replace(spec, name="once", look_ups=False), plan, lambda message: None)
    assert all(once["hashes"][stage] != record["hashes"][stage] for stage in ("stage1", "stage2"))
    assert once["scores"] == record["scores"] and once["hashes"]["stage0"] == record["hashes"]["stage0"]


def test_places_are_shared_out_in_the_bytes_of_the_row(plan):
    spec = RowSpec(name="shared", changes=CHANGES | {"stage0": CHANGES["stage0"] | {"share_places": True}})
    record = run_row(spec, dataclasses.replace(plan, measures=["loss"]), lambda message: None)
    saved = load_model(str(plan.folder(spec) / "model")).model
    places, even = [a.lizard.config.kept_by_head for a in saved.lizard_attentions()], record["settings"]["config"]
    assert record["places"] == [list(heads) for heads in places] and even["attention"]["kept_keys"] == 8
    evenly = copy.deepcopy(saved.config)
    evenly.lizard = even
    assert constant_bytes(saved.config, torch.float32) <= constant_bytes(evenly, torch.float32)
    assert plan.record(dataclasses.replace(spec, changes=CHANGES), 3) is None
    unscored = dataclasses.replace(plan, budget=dataclasses.replace(TINY, name="unscored", stage0_steps=0))
    with pytest.raises(ValueError, match="shared.s0: places are shared out by fitted scores, and there is no stage 0"):
        run_row(spec, unscored, lambda message: None)
    row = ROWS["recommended-shared-256"]
    beside, even = (one.spec(None, 30).config(BUDGET, 30) for one in (row, ROWS["recommended-kept-256"]))
    assert row.reference == "recommended-kept-256" and beside == even.replace(stage0={"share_places": True}) != even


def test_records_from_before_kept_keys_stay(plan):
    """Their settings have no stage 0, no steps of one, and none of the fields of kept keys."""
    for spec in (RowSpec(name="old"), RowSpec(name="teacher", preset="teacher", stage1=False, stage2=False)):
        settings = plan.settings(spec, 3)
        assert plan.record(spec, 3) is None
        del settings["config"]["stage0"], settings["budget"]["stage0_steps"]
        del settings["config"]["attention"]["kept_keys"], settings["config"]["attention"]["score_dim"]
        merge_records(plan.results, {spec.stem: {"settings": settings, "measures": {}, "seconds": 0.0}})
        for seed_of_stage0 in (0, 4):
            again = dataclasses.replace(spec, changes={"stage0": {"seed": seed_of_stage0}})
            assert plan.record(again, 3) is not None  # what scores would be trained with says nothing here
        kept = dataclasses.replace(spec, changes={"attention": {"kept_keys": 8}})
        if spec.preset != "teacher":
            assert plan.record(kept, 3) is None


def test_time_for_scores_is_planned(plan):
    runner = Runner(plan, None, gpus=[], jobs_per_gpu=1, minutes=None)
    rows = [RowSpec(name="other", changes={"attention": {"window": 16, "kept_keys": places}}) for places in (0, 8)]
    assert runner.estimate(rows[1]) - runner.estimate(rows[0]) == pytest.approx(2 * SCORES)


def test_the_linear_branch_off_leaves_the_kept_keys():
    """Of a student whose places hold every key, the exact branch alone is the teacher."""
    model, ids = student(attention={"kept_keys": 60}), tokens(2, 60)
    few = student(attention={"kept_keys": 5})
    with torch.no_grad():
        wanted = teacher()(ids).logits
        whole = few(ids).logits
        with switched_off(few, "linear"):
            exact = few(ids).logits
        with switched_off(few, "window"):
            linear = few(ids).logits
        with switched_off(model, "linear"):
            torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(few(ids).logits, whole)
    control = student("window_only", seed=None)
    with torch.no_grad():
        assert not torch.allclose(exact, control(ids).logits, atol=1e-3)
    assert not torch.allclose(exact, whole, atol=1e-3) and not torch.allclose(linear, whole, atol=1e-3)
    both = student(attention={"kept_keys": 5, "mix": "sum", "merge_bias": "none"})
    with pytest.raises(ValueError, match='mix="sum" with kept_keys has no exact branch'), switched_off(both, "linear"):
        pass


class Reader(torch.nn.Module):
    """Knows the answers of ``pairs``; of the key numbered ``miss`` it takes one digit for another."""

    def __init__(self, pairs, miss: int = -1, digit: int = 3) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.pairs, self.miss, self.digit, self.asked = pairs, miss, digit, []

    def forward(self, input_ids, use_cache, logits_to_keep):
        assert use_cache is False
        logits = torch.zeros(len(input_ids), logits_to_keep, 300)
        for row, ids in enumerate(input_ids.tolist()):
            number = next(i for i, (prompt, answer) in enumerate(self.pairs) if ids == prompt + answer[:-1])
            self.asked.append(number)
            for place, token in enumerate(self.pairs[number][1]):
                wrong = number == self.miss and place == self.digit
                logits[row, place, 7 if wrong else token] = 1
        return type("Output", (), {"logits": logits})


def test_a_key_is_found_where_every_digit_is_the_likeliest():
    tokenizer, texts = byte_tokenizer(), tokens(3, 400)
    for around in (None, texts):
        pairs = passkey_examples(tokenizer, 400, 6, seed=5, texts=around)
        assert all(len(prompt) + len(answer) == 400 for prompt, answer in pairs)
        options = dict(trials=6, seed=5, texts=around, batch_tokens=900)
        done: list[int] = []
        model = Reader(pairs)
        assert passkeys_found(model, tokenizer, [400], advance=done.append, **options) == {400: 1.0}
        assert sorted(model.asked) == [*range(6)] and sum(done) == 6 and max(done) == 2
        for digit in range(5):
            assert passkeys_found(Reader(pairs, 4, digit), tokenizer, [400], **options) == {400: pytest.approx(5 / 6)}
    plain, hidden = (passkey_examples(tokenizer, 400, 6, seed=5, texts=around) for around in (None, texts))
    assert [answer for _, answer in plain] == [answer for _, answer in hidden]  # the same keys
    for number, (prompt, answer) in enumerate(hidden):
        key = tokenizer.decode(answer)
        assert tokenizer.decode(prompt).count(f"The pass key is {key}. Keep it in mind. {key} is the pass key. ") == 1
        row, needle = texts[number % 3].tolist(), tokenizer(f"The pass key is {key}")["input_ids"]
        at = next(i for i in range(400) if prompt[i : i + len(needle)] == needle)
        start = next(i for i in range(400) if prompt[i : i + 20] == row[:20]) if number else at
        assert prompt[start:at] == row[: at - start]
    with pytest.raises(ValueError, match="takes .* tokens of text around the key, got 400"):
        passkeys_found(Reader([]), tokenizer, [1000], texts=texts)


def test_it_is_what_greedy_generation_finds():
    tokenizer = byte_tokenizer()
    model = teacher(vocab_size=len(tokenizer), max_position_embeddings=4096)
    taught = [prompt + answer for prompt, answer in passkey_examples(tokenizer, 340, 4)]
    ids, asked = torch.tensor(taught), slice(-6, None)  # five digits, and what stands before
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        logits = model(ids, logits_to_keep=6).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, asked][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = passkeys_found(model, tokenizer, [340], trials=4)
    assert found == passkey_accuracy(model, tokenizer, [340], trials=4) and found[340] > 0


def test_the_page_shows_what_was_found_and_how_scores_fit(folder):
    before = quality_text(folder, folder, "figures")
    assert "R2 of the scores" not in before and "Passkey in novels" not in before
    spec = ROWS["recommended-kept-256"].spec(None, 30)
    write_row(folder, ROWS["recommended-w384"].spec(None, 30), 3.09)
    found = {"filler": {"512": 0.9, "2048": 1.0}, "novel": {"512": 0.7, "2048": 0.35}}
    write_row(folder, spec, 3.05, found=found)
    change_record(folder / "quick.jsonl", spec.stem, lambda r: r["stages"].update(stage0={"r2": 0.7412}))
    page = quality_text(folder, folder, "figures")
    assert "| recommended-kept-256 | 256 kept keys | 3.050 | -0.040 (recommended-w384) |" in page
    assert "| 40.2 | 0.741 | 1 |" in page and "| recommended-kept-256 | 90% | 100% |" in page
    assert "| recommended-kept-256 | 70% | 35% |" in page
