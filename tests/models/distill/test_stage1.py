"""Stage 1: the new parameters learn, the teacher stays, a run that stops goes on as if it had not."""

import contextlib
import dataclasses
import errno
import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import student, tokens
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models.distill import TrainingInterrupted, held_out_errors, train_stage1, trainer
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.text.sequences import StreamedTokens


def test_the_error_falls_and_the_teacher_stays(tmp_path):
    model = fresh()
    before, held_out = snapshot(model), tokens(2, 48, seed=9)
    error = held_out_errors(model, held_out).mean()
    recipe = dataclasses.replace(recipes(model, steps=20)[0], target="heads")  # what is measured
    result = train_stage1(model, Sequences(), arguments(tmp_path), recipe)
    assert held_out_errors(model, held_out).mean() < 0.98 * error
    new = {name for name, _ in model.lizard_parameters()}
    assert moved(before, model) == new
    assert model.mode == "student" and not model.training and not any(p.requires_grad for p in model.parameters())
    assert result.steps == 20 and [step for step, _ in result.losses] == list(range(1, 21))
    assert result.losses[-1][1] < result.losses[0][1]
    assert result.parameters == sum(p.numel() for _, p in model.lizard_parameters())


def test_parameters_of_a_bfloat16_model_are_float32_and_move(tmp_path):
    model = fresh().to(torch.bfloat16)
    before = snapshot(model)
    recipe = dataclasses.replace(recipes(model, steps=2)[0], learning_rate=1e-5, gate_learning_rate=1e-5)
    train_stage1(model, Sequences(), arguments(tmp_path), recipe)
    assert all(p.dtype == torch.float32 for _, p in model.lizard_parameters())
    assert moved(before, model) == {name for name, _ in model.lizard_parameters()}


def test_relative_errors_are_those_of_the_heads():
    """Against the two attentions computed apart: squared error over squared target, a head, averaged."""
    model, ids = student(), tokens(3, 48)
    attention = model.lizard_attentions()[0]

    def apart(ids):
        heads = []
        for mode in ("teacher", "student"):
            model.set_attention_mode(mode)
            hook = attention.o_proj.register_forward_pre_hook(lambda module, inputs: heads.append(inputs[0]))
            with torch.no_grad():
                model(ids)
            hook.remove()
        target, output = (h.unflatten(-1, (4, -1)) for h in heads)
        return ((target - output).square().sum((0, 1, 3)) / target.square().sum((0, 1, 3))).mean()

    for size in (1, 2, 3):  # a batch counts by its rows
        errors = held_out_errors(model, ids, batch_size=size)
        wanted = sum(apart(batch) * len(batch) for batch in ids.split(size)) / 3
        torch.testing.assert_close(errors[0], wanted)
    assert len(errors) == model.config.num_hidden_layers and model.mode == "student"


def test_the_recipe_chooses_the_error(tmp_path):
    rows = Sequences(count=2)  # one batch, in one order or the other
    for kind in ("relative", "mse"):
        model = fresh()
        recipe = dataclasses.replace(recipes(model, steps=1)[0], error=kind)
        wanted = loss_with(model, recipe, rows.rows).item()
        other = dataclasses.replace(recipe, error="mse" if kind == "relative" else "relative")
        assert abs(loss_with(model, other, rows.rows).item() - wanted) > 0.01 * wanted
        result = train_stage1(model, rows, arguments(tmp_path / kind), recipe)
        assert result.losses[0][1] == pytest.approx(wanted, rel=1e-4)


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole, parts = fresh(), fresh()
    recipe = recipes(whole, steps=7)[0]
    train_stage1(whole, Sequences(), arguments(tmp_path / "a"), recipe)

    run = arguments(tmp_path / "b", save_steps=100)
    with pytest.raises(TrainingInterrupted, match="test stopped at step [1-6] of 7"):
        train_stage1(parts, Sequences(stop_at=7), run, recipe)
    assert not any(p.requires_grad for p in parts.parameters()) and parts.mode == "student"
    with pytest.raises(ValueError, match="holds checkpoints already: resume"):
        train_stage1(fresh(), Sequences(), run, recipe)

    again = fresh()
    result = train_stage1(again, Sequences(), dataclasses.replace(run, resume=True), recipe)
    assert moved(snapshot(whole), again) == set()
    assert [step for step, _ in result.losses] == list(range(1, 8))

    loaded = fresh()  # a finished run is only read
    train_stage1(loaded, Sequences(stop_at=1), dataclasses.replace(run, resume=True), recipe)
    assert moved(snapshot(whole), loaded) == set()


def test_streamed_data_resume_where_they_stopped(tmp_path):
    def stream(stop_at: int | None = None) -> StreamedTokens:
        rows = Sequences(stop_at=stop_at)
        return StreamedTokens(lambda epoch: (rows[i]["input_ids"].numpy() for i in range(16)), 48, buffer=4)

    whole, again = fresh(), fresh()
    recipe = recipes(whole, steps=11)[0]  # into the second epoch
    train_stage1(whole, stream(), arguments(tmp_path / "a"), recipe)
    with pytest.raises(TrainingInterrupted):
        train_stage1(fresh(), stream(stop_at=14), arguments(tmp_path / "b"), recipe)
    train_stage1(again, stream(), arguments(tmp_path / "b", resume=True), recipe)
    assert moved(snapshot(whole), again) == set()


def test_a_second_interrupt_stops_at_once():
    from lizard_models.distill.progress import InterruptCallback

    with InterruptCallback() as interrupt, pytest.raises(KeyboardInterrupt):
        interrupt._ask(2, None)
        interrupt._ask(2, None)


def test_checkpoints_hold_what_trains_and_the_newest_two(tmp_path):
    model = fresh()
    train_stage1(model, Sequences(), arguments(tmp_path, save_steps=1), recipes(model, steps=4)[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "run.json"]
    saved = load_file(tmp_path / "checkpoint-4" / trainer.TRAINED)
    assert set(saved) == {f"model.{name}" for name, _ in model.lizard_parameters()}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("IO error: No space left on device")]
)
def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch, error):
    saves = []

    def save_file(*args):
        saves.append(args)
        if len(saves) == 2:
            raise error
        return original(*args)

    original = trainer.save_file
    monkeypatch.setattr(trainer, "save_file", save_file)
    model = fresh()
    with pytest.raises(type(error)):
        train_stage1(model, Sequences(), arguments(tmp_path, save_steps=2), recipes(model, steps=6)[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "run.json"]


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    model = fresh()
    recipe = recipes(model, steps=2)[0]
    train_stage1(model, Sequences(), arguments(tmp_path), recipe)
    other = dataclasses.replace(recipe, learning_rate=0.5, seed=3)
    with pytest.raises(ValueError, match="of a run with other learning_rate, seed"):
        train_stage1(fresh(), Sequences(), arguments(tmp_path, resume=True), other)
    record = json.loads((tmp_path / trainer.RUN).read_text())
    for weight, resumes in ((0.0, True), (0.3, False)):  # a run of before the field was retired
        record["recipe"]["attention_weight"] = weight
        (tmp_path / trainer.RUN).write_text(json.dumps(record))
        refused = pytest.raises(ValueError, match="of a run with other attention_weight")
        with contextlib.nullcontext() if resumes else refused:
            train_stage1(fresh(), Sequences(), arguments(tmp_path, resume=True), recipe)
    del record["recipe"]["attention_weight"]
    (tmp_path / trainer.RUN).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="parameters differ"):
        bigger = fresh(num_hidden_layers=4)
        train_stage1(bigger, Sequences(), arguments(tmp_path, resume=True), recipe)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = fresh()
    with torch.no_grad():
        next(p for _, p in model.lizard_parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="relative error is nan at step 1"):
        train_stage1(model, Sequences(), arguments(tmp_path), recipes(model)[0])


def test_accumulation_gives_the_same_parameters(tmp_path):
    results = []
    for micro in (4, 1):
        model = fresh()
        recipe = dataclasses.replace(recipes(model, steps=3)[0], batch_size=4, error="mse")
        train_stage1(model, Sequences(), arguments(tmp_path / str(micro), micro_batch_size=micro), recipe)
        results.append(snapshot(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-4, rtol=1e-3)


def test_a_model_without_new_parameters_cannot_train(tmp_path):
    model = fresh("liger")
    with pytest.raises(ValueError, match="no parameters to train"):
        train_stage1(model, Sequences(), arguments(tmp_path), recipes(model)[0])


def loss_with(model, recipe, rows: torch.Tensor) -> torch.Tensor:
    model.set_attention_mode("distill", recipe)
    loss = AttentionTransfer(model)(rows)["loss"]
    model.set_attention_mode("student")
    return loss
