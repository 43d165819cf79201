"""Runs with kept keys: stage 0 before stage 1, its rows, its results, what it goes on with and what it refuses."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from cli_calls import call, error
from readable import save_teacher, save_texts
from tiny import student, teacher
from transformers import AutoConfig, AutoModelForCausalLM

from lizard_layers import KeyScore, empty_state, state_bytes
from lizard_models import LizardConfig, Stage0Config, linearize, load_teacher
from lizard_models.distill import score_fit
from lizard_models.evaluation.control import window_control
from lizard_models.model.layer_configs import attention_config
from lizard_models.runs import linearize_run, score_rows
from lizard_models.runs.cost import run_cost
from lizard_models.runs.memory import kept_bytes, lizard_bytes
from lizard_models.text.look_ups import look_up_rows
from lizard_models.text.sequences import PackedTokens, StreamedTokens, load_sequences

LENGTH, WINDOW, PLACES = 160, 16, 8
RECIPE = Stage0Config(max_steps=3, sequence_length=LENGTH, label_queries=32)
SMALL = ["--preset", "plain", "--kept-keys", PLACES, "--set", f"attention.window={WINDOW}",
         "--set", "attention.score_dim=8", "--set", f"stage0.sequence_length={LENGTH}",
         "--set", "stage0.label_queries=32", "--stage0-steps", "3", "--stage1-steps", "2", "--stage2-steps", "1",
         "--seq-len", "64", "--batch-size", "2", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts")
    return folder


def command(world, out, *more):
    return ["linearize", world / "teacher", "--data", world / "texts", *SMALL, "--out", out, *more]


@pytest.fixture(scope="module")
def finished(world):
    out = world / "model"
    return out, call(*command(world, out, "--save-steps", "1")).output


def own_scores(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".key_score." in name}


def test_stage_0_comes_first_and_says_how_well_scores_fit(finished, world):
    out, output = finished
    assert output.index("scores: R2 ") < output.index("stage 1, attention approximation")
    assert "data of stage0: 6 rows of 160 tokens with things to look up, of " in output
    training = json.loads((out / "training.json").read_text())
    assert list(training["stages"]) == ["stage0", "stage1", "stage2"]
    told = training["stages"]["stage0"]
    assert told["steps"] == 3 and [len(heads) for heads in told["r2"]] == [2, 2, 2]
    r2 = np.mean(told["r2"])
    by_layer = " ".join(f"{np.mean(heads):.2f}" for heads in told["r2"])
    assert f"scores: R2 {r2:.3f} on 8 held-out rows, by layer {by_layer}" in output
    assert json.loads((out / "evaluation.json").read_text())["settings"]["stages"]["stage0"]["r2"] == told["r2"]

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.lizard_attentions()[0].lizard.config.kept_keys == PLACES
    card = (out / "README.md").read_text()
    held = sum(state_bytes(empty_state(attention_config(model.config, i), 1)) for i in range(3))
    without = LizardConfig.from_dict(model.config.lizard).replace(attention={"kept_keys": 0})
    plain = linearize(teacher(vocab_size=259, max_position_embeddings=4096), without)
    less = sum(state_bytes(empty_state(a.lizard.config, 1)) for a in plain.lizard_attentions())
    for text in (
        f"4 anchors, {PLACES} kept keys, gate",
        f"R2 of the scores {r2:.3f} on held-out rows",
        f"state of a sequence of 8,192 tokens: {held:,} bytes with keys in float32, of which kept keys take "
        f"{held - less:,}",
        "stage0: 3 steps of 2 x 160 tokens",
    ):
        assert text in card

    info = call("info", out).output.replace("\n", " ")
    assert f"kept keys: {PLACES} of each key head in every linearized layer" in info
    again = call("generate", out, "the wind turns the mill", "-n", "4", "--device", "cpu").stdout
    assert again.startswith("the wind turns the mill")


def test_what_was_measured_is_of_the_scores_on_rows_not_trained_on(finished, world):
    """R2 anew, of the saved scores in a fresh student, on rows made of the first part of the text."""
    out, _ = finished
    found = load_teacher(str(world / "teacher"))
    kept = linearize(found.model, LizardConfig.from_dict(AutoConfig.from_pretrained(out).lizard)).requires_grad_(False)
    saved = own_scores(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    with torch.no_grad():
        for name, parameter in own_scores(kept).items():
            parameter.copy_(saved[name])
    text = load_sequences([str(world / "texts")], found.tokenizer, LENGTH)
    first = np.concatenate([text[i]["input_ids"].numpy() for i in range(3)])  # of 6 rows to train on and 8 beside
    rows = look_up_rows(PackedTokens(first, LENGTH), found.tokenizer, 8, gap=LENGTH // 4, seed=1)
    fit = score_fit(kept, kept.key_scores(), torch.stack([rows[i]["input_ids"] for i in range(8)]), RECIPE)
    told = json.loads((out / "training.json").read_text())["stages"]["stage0"]["r2"]
    torch.testing.assert_close(torch.stack(fit), torch.tensor(told, dtype=torch.float64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stage", ["stage0", "stage1"])
def test_a_run_stopped_in_any_stage_goes_on_to_the_same_model(world, finished, tmp_path, monkeypatch, stage):
    out = tmp_path / "out"
    name, reads = f"train_{stage}", []
    train = getattr(linearize_run, name)

    def interrupted(model, *given):
        rows = given[1] if stage == "stage0" else given[0]
        read = type(rows).__getitem__

        def counted(self, index):
            reads.append(index)
            if len(reads) == (4 + 3 if stage == "stage0" else 2):  # in the second step, after the four of the sample
                os.kill(os.getpid(), signal.SIGINT)
            return read(self, index)

        monkeypatch.setattr(type(rows), "__getitem__", counted)
        try:
            return train(model, *given)
        finally:
            monkeypatch.setattr(type(rows), "__getitem__", read)

    with monkeypatch.context() as stop:
        stop.setattr(linearize_run, name, interrupted)
        line = error(*command(world, out, "--save-steps", "1"), code=130)
    assert "stopped at step" in line and "nothing half-written is left; go on with: lizard-attn" in line
    assert not out.exists() and (tmp_path / "out.training" / stage).is_dir()
    assert "of a run with other config" in error(*command(world, out, "--resume", "--set", "stage0.seed=5"))
    plan = tmp_path / "out.training" / "plan.json"
    values = json.loads(plan.read_text())
    values["config"]["attention"]["memory"] = "sum"  # as a version with this field wrote it, at its default
    values["config"]["name"] = "recommended"  # as the preset plain was called
    plan.write_text(json.dumps(values))
    call(*command(world, out, "--resume", "--save-steps", "1"))
    whole, again = (AutoModelForCausalLM.from_pretrained(folder) for folder in (finished[0], out))
    for (key, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), key


def test_scores_that_changed_are_another_model_for_the_stages_after(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as stop:
        stop.setattr(linearize_run, "train_stage2", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        error(*command(world, out), code=130)
    shutil.rmtree(tmp_path / "out.training" / "stage0")
    train = linearize_run.train_stage0

    def other(model, scores, rows, run, recipe, held_out):
        result = train(model, scores, rows, run, recipe, held_out)
        with torch.no_grad():
            scores[0].bias += 1e-6
        return result

    monkeypatch.setattr(linearize_run, "train_stage0", other)
    assert "is of a run on another model" in error(*command(world, out, "--resume"))


def test_stage_0_is_left_out_or_alone(world, tmp_path):
    output = call(*command(world, tmp_path / "without", "--stage0-steps", "0")).output
    assert "stage 0 is left out: the keys least like the mean key are kept" in output
    assert list(json.loads((tmp_path / "without" / "training.json").read_text())["stages"]) == ["stage1", "stage2"]
    starts = linearize(teacher(), LizardConfig.preset("plain", attention={"kept_keys": 1, "score_dim": 8}))
    left = own_scores(AutoModelForCausalLM.from_pretrained(tmp_path / "without", dtype=torch.float32))
    assert all(torch.equal(left[name], p) for name, p in own_scores(starts).items())

    alone = tmp_path / "alone"
    call(*command(world, alone, "--stage1-steps", "0", "--stage2-steps", "0", "--micro-batch-size", "1"))
    assert list(json.loads((alone / "training.json").read_text())["stages"]) == ["stage0"]
    plain = [part for part in command(world, tmp_path / "plain") if part not in ("--kept-keys", PLACES)]
    line = error(*plain)
    assert line.startswith("error: --stage0-steps: stage 0 fits the scores of kept keys, and there are none")
    assert "kept_keys=8 leaves the other keys" in error(*command(world, tmp_path / "no", "--preset", "window_only"))


def test_text_too_short_for_its_rows_is_refused_before_any_training(world, tmp_path):
    out = tmp_path / "out"
    line = error(*command(world, out, "--set", "stage0.sequence_length=8192"))
    assert (
        "stage 0 takes at least 2 rows of stage0.sequence_length=8192 tokens" in line
        and "the text gives 1: give" in line
    )
    assert "a shorter stage0.sequence_length (at least 52: window, anchors and stage0.label_queries=32)" in line
    assert line.endswith("by which the keys least like the mean key are kept, or take preset plain, which keeps none")
    line = error(*command(world, out, "--set", "stage0.sequence_length=20000"))
    assert "tokens give none: give more text" in line
    line = error(*command(world, out, "--set", "stage0.label_queries=150"))
    assert "stage0.sequence_length=160 is too short" in line and "wanted at least 170, or fewer label_queries" in line
    assert not any(tmp_path.iterdir())


def test_rows_are_counted_from_steps_or_epochs_and_none_is_held_out_and_trained_on(world, monkeypatch):
    found = load_teacher(str(world / "teacher"))
    model = linearize(found.model, LizardConfig.preset("plain", attention={"window": 16, "kept_keys": 8}))
    whole = load_sequences([str(world / "texts")], found.tokenizer, LENGTH)
    seen = []
    make = score_rows.look_up_rows

    def watched(dataset, *given, **more):
        seen.append({tuple(row) for row in dataset.sequences.tolist()})
        return make(dataset, *given, **more)

    monkeypatch.setattr(score_rows, "look_up_rows", watched)
    passes = -(-3 * (len(whole) - 8) // 4)  # half a row more than the text, two a step
    for changes, steps in (({"max_steps": 40}, 40), ({"max_steps": None, "epochs": 1.5}, passes)):
        recipe = Stage0Config(**dict(sequence_length=LENGTH, label_queries=32) | changes)
        rows = score_rows.score_rows([str(world / "texts")], found, model, recipe)
        text, held_out, asked = seen[-3:]
        assert not text & held_out and asked == held_out and len(text | held_out) <= len(whole)
        assert rows.recipe.max_steps == steps and rows.recipe.epochs is None
        assert len(rows.training) == 2 * rows.recipe.max_steps and rows.held_out.shape == (8, LENGTH)
        assert rows.asked.shape == (4, LENGTH)  # in each of which something comes again
        parts = [tuple(row) for row in rows.asked.tolist()]
        assert not text & set(parts) and not held_out & set(parts) and len(set(parts)) == 4
    assert rows.micro_batch_size(None) is None and rows.micro_batch_size(9) == 2 and rows.micro_batch_size(1) == 1

    stream = StreamedTokens(lambda epoch: iter([np.arange(LENGTH * 300) % 90]), LENGTH, buffer=4)
    monkeypatch.setattr(score_rows, "load_mixture", lambda *given, **more: stream)
    rows = score_rows.score_rows(
        ["hub"], found, model, Stage0Config(max_steps=5, sequence_length=LENGTH, label_queries=32)
    )
    assert len(rows.training) == 10 and len(seen[-3]) + len(seen[-2]) <= 18
    with pytest.raises(ValueError, match="stage0.max_steps must be given: the data are streamed"):
        recipe = Stage0Config(epochs=1.0, max_steps=None, sequence_length=LENGTH, label_queries=32)
        score_rows.score_rows(["hub"], found, model, recipe)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="stage0.batch_size=2 must be a multiple of the 3 processes"):
        score_rows.score_rows(["hub"], found, model, RECIPE)


def test_converted_folders_and_students_start_alike(world, tmp_path):
    out = tmp_path / "converted"
    options = ["--preset", "plain", "--kept-keys", "8", "--set", "attention.window=16"]
    said = " ".join(call("convert", world / "teacher", *options, "--out", out).output.split())
    assert "kept keys: 8 of each key head in every linearized layer, those least like the mean key: no score" in said
    made = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    config = LizardConfig.preset("plain", attention={"window": 16, "kept_keys": 8})
    found = load_teacher(str(world / "teacher"))
    direct = linearize(found.model, config)
    names = own_scores(made)
    assert len(names) == 15 and all(torch.equal(names[name], p) for name, p in own_scores(direct).items())
    for score in made.key_scores():
        start = KeyScore(64, 2, 16)
        assert all(torch.equal(a, b) for a, b in zip(score.parameters(), start.parameters(), strict=True))
        assert score.linear_weight.tolist() == [[0.0, 0.0, -1.0]] * 2 and not score.outer_weight.any()
    control = window_control(found, config)
    assert not control.key_scores() and control.lizard_attentions()[0].lizard.config.window == 16


def test_info_and_plans_count_kept_keys(world):
    teacher_under = ["info", world / "teacher", "--preset", "plain", "--set", "attention.window=16"]
    plain = call(*teacher_under).output
    shown = call(*teacher_under, "--kept-keys", "300").output
    assert "kept keys" not in plain and "kept keys: 300 of each key head in every linearized layer" in shown
    config = student(attention={"kept_keys": 300}).config
    dims, heads = 16, 2  # of a key: itself, its value, 128 inputs of its features, a gate, a score and a position
    place = 4 * (dims + dims + 128 + 1 + 1) + 8
    assert kept_bytes(config, torch.float32) - 3 * 300 * heads * place < 3 * 4096  # the scores' own state
    assert lizard_bytes(config, 9, torch.float32) > 3 * 300 * heads * place
    assert "is linearized already" in error("info", save_kept(world), "--kept-keys", "9")

    lizard = LizardConfig.preset("plain", attention={"kept_keys": 64})
    cost = run_cost(teacher().config, lizard)
    scores = sum(p.numel() for p in linearize(teacher(), lizard).key_scores().parameters())
    without = run_cost(teacher().config, lizard.replace(attention={"kept_keys": 0}))
    assert cost.stage0.steps == 240 and cost.stage0.tokens == 240 * 2 * 4096 and without.stage0 is None
    assert cost.new_parameters - without.new_parameters == scores and cost.stage1.flop > without.stage1.flop
    assert cost.stage0.flop > 6 * scores * cost.stage0.tokens
    assert cost.stage1.bytes - without.stage1.bytes == 4 * scores  # held, without gradient or moments


def save_kept(world):
    folder = world / "kept"
    if not folder.exists():
        student(attention={"kept_keys": 5}).save_pretrained(folder)
    return folder
