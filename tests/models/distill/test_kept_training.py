"""Models with kept keys in training: stage 0 fits their own scores, stages 1 and 2 leave them alone."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import student, tokens, windows
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models import LizardConfig, widen
from lizard_models.distill import (
    TrainingInterrupted,
    compiled,
    key_scores,
    score_fit,
    stage0,
    train_stage0,
    train_stage1,
    train_stage2,
    trainer,
)
from lizard_models.distill.compiled import parts_to_compile
from lizard_models.distill.score_files import SCORES
from lizard_models.model.families.llama import LizardLlamaForCausalLM
from lizard_models.recipes import Stage0Config

KEPT = dict(window=8, kept_keys=5, score_dim=6)
SHORT = dict(max_steps=3, batch_size=2, sequence_length=48, label_queries=8)


def kept(**changes):
    """A student as ``linearize`` leaves it, that keeps keys."""
    return fresh(attention=KEPT, **changes)


def scores_of(model) -> set[str]:
    return {name for name, _ in model.lizard_parameters() if ".key_score." in name}


def test_a_recipe_of_stage_0_is_part_of_the_config():
    config = LizardConfig.preset("plain", attention={"kept_keys": 5}, stage0={"max_steps": 7, "seed": 3})
    assert config.stage0 == Stage0Config(max_steps=7, seed=3)
    assert LizardConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["stage0"]["sequence_length"] == 4096
    assert config.replace(stage0={"batch_size": 4}).stage0 == Stage0Config(max_steps=7, seed=3, batch_size=4)
    old = config.to_dict()
    del old["stage0"], old["attention"]["kept_keys"], old["attention"]["score_dim"]  # as before there were any
    assert LizardConfig.from_dict(old) == LizardConfig.preset("plain")
    with pytest.raises(ValueError, match="unknown keys in Lizard config: stage0.nonsense"):
        LizardConfig.from_dict({"stage0": {"nonsense": 1}})
    with pytest.raises(ValueError, match="give one of epochs and max_steps, got epochs=2.0, max_steps=240"):
        LizardConfig.preset("plain", stage0={"epochs": 2.0})


def test_stage_0_fits_the_models_own_scores(tmp_path):
    model, apart = kept(), kept()
    before, recipe = snapshot(model), Stage0Config(**SHORT)
    held_out = tokens(2, 48, seed=7)
    result = train_stage0(model, model.key_scores(), Sequences(), arguments(tmp_path / "own"), recipe, held_out)
    assert moved(before, model) == scores_of(model) and len(scores_of(model)) == 15
    assert result.parameters == sum(before[name].numel() for name in scores_of(model))
    assert not any(p.requires_grad for p in model.parameters()) and model.mode == "student"

    scores = key_scores(apart, 6)  # by themselves, from the same starts as the model's own
    for score, own in zip(scores, apart.key_scores(), strict=True):
        score.load_state_dict(own.state_dict())
        score.seed = own.seed
    second = train_stage0(apart, scores, Sequences(), arguments(tmp_path / "apart"), recipe, held_out)
    for a, b in zip(model.key_scores().parameters(), scores.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.r2 == result.r2 and not moved(snapshot(kept()), apart)
    fit = score_fit(model, model.key_scores(), held_out, recipe)
    assert result.mean_r2 == pytest.approx(torch.stack(fit).mean().item())

    ids = tokens(1, 40)
    model.save_pretrained(tmp_path / "saved")
    loaded = LizardLlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert not torch.equal(apart(ids).logits, model(ids).logits)  # other keys are kept
    assert not student("window_only").key_scores() and not list(student("window_only").stage_parameters())


def test_stage_0_goes_on_and_its_end_is_read_as_it_was(tmp_path, monkeypatch):
    recipe, folder = Stage0Config(**SHORT), tmp_path / "run"
    whole = kept()
    first = train_stage0(whole, whole.key_scores(), Sequences(), arguments(tmp_path / "whole"), recipe)
    stopped = kept()
    with pytest.raises(TrainingInterrupted):
        run = arguments(folder, save_steps=1)
        train_stage0(stopped, stopped.key_scores(), Sequences(stop_at=4 + 3), run, recipe)
    assert not (folder / SCORES).exists()
    run = arguments(folder, save_steps=1, resume=True)
    resumed, again = kept(), kept()
    train_stage0(resumed, resumed.key_scores(), Sequences(), run, recipe)

    monkeypatch.setattr(stage0.ScoreTransfer, "start", lambda *given: pytest.fail("measured again"))
    second = train_stage0(again, again.key_scores(), Sequences(), run, recipe)
    assert moved(snapshot(whole), resumed) == moved(snapshot(whole), again) == set()
    assert second.r2 == first.r2 and second.losses == first.losses and second.steps == 3
    with pytest.raises(ValueError, match="is of a run with other learning_rate"):
        other = dataclasses.replace(recipe, learning_rate=0.5)
        train_stage0(again, again.key_scores(), Sequences(), run, other)
    data = bytearray((folder / SCORES).read_bytes())
    data[-5] ^= 1
    (folder / SCORES).write_bytes(data)
    with pytest.raises(ValueError, match="scores.safetensors is damaged: delete it, and resume"):
        train_stage0(again, again.key_scores(), Sequences(), run, recipe)


def test_stage_1_leaves_scores_alone_and_knows_them(tmp_path):
    model = kept()
    before, recipe = snapshot(model), recipes(model, steps=2)[0]
    wanted = {name for name, _ in model.stage_parameters()}
    result = train_stage1(model, Sequences(), arguments(tmp_path / "run"), recipe)
    assert moved(before, model) == wanted and not wanted & scores_of(model)
    assert wanted | scores_of(model) == {name for name, _ in model.lizard_parameters()}
    assert result.parameters == sum(before[name].numel() for name in wanted)
    saved = load_file(tmp_path / "run" / "checkpoint-2" / trainer.TRAINED)
    assert set(saved) == {f"model.{name}" for name in wanted}

    same, other = kept(), kept()
    run = arguments(tmp_path / "run", resume=True)
    train_stage1(same, Sequences(), run, recipe)
    assert moved(snapshot(model), same) == set()
    with torch.no_grad():
        other.key_scores()[1].bias += 1e-3  # as if stage 0 had ended otherwise
    with pytest.raises(ValueError, match="on another model: its frozen parameters differ"):
        train_stage1(other, Sequences(), run, recipe)
    trained = json.loads((tmp_path / "run" / trainer.RUN).read_text())
    longer = kept()
    longer.config.lizard["stage0"]["max_steps"] = 9  # a recipe computes nothing
    train_stage1(longer, Sequences(), run, recipe)
    assert json.loads((tmp_path / "run" / trainer.RUN).read_text()) == trained


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stage_2_leaves_scores_alone(kind, tmp_path):
    model = kept()
    before = snapshot(model)
    recipe = dataclasses.replace(recipes(model, steps=2)[1], trained=kind, lora_targets=("q_proj", "k_proj"))
    tuned, result = train_stage2(model, Sequences(), arguments(tmp_path), recipe)
    projections = {f"model.layers.{i}.self_attn.{p}.weight" for i in range(3) for p in ("q_proj", "k_proj")}
    assert moved(before, tuned) == projections | {name for name, _ in model.stage_parameters()}
    assert scores_of(tuned) == scores_of(kept()) and result.losses[-1][1] > 0


def test_recomputed_and_compiled_layers_train_alike(tmp_path, monkeypatch):
    torch.compiler.reset()
    compile = torch.compile
    monkeypatch.setattr(compiled.torch, "compile", lambda f, **options: compile(f, backend="eager", **options))
    tuned = []
    for name, ways in (
        ("plain", {}),
        ("recomputed", {"gradient_checkpointing": True}),
        ("compiled", {"compile": True}),
    ):
        model = kept()
        run = arguments(tmp_path / name, **ways)
        tuned.append(snapshot(train_stage2(model, Sequences(), run, recipes(model, steps=2)[1])[0]))
    for other in tuned[1:]:
        for name, value in tuned[0].items():
            torch.testing.assert_close(other[name], value, msg=name)
    parts = {type(part).__name__ for part in parts_to_compile(kept())}
    assert parts == {"LlamaMLP", "LlamaRMSNorm"}


def gradients(model, loss) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, [p for _, p in model.stage_parameters()])
    assert all(gradient.isfinite().all() for gradient in found)
    return found


@pytest.mark.parametrize("layout", ["left", "packed"])
def test_gradients_of_padded_and_packed_rows_are_those_of_the_texts(layout):
    """Float64; by rows alone, in the naive op. The loss weighs every logit of a text differently."""
    texts = [tokens(1, length, seed=length) for length in (33, 21)]
    draw = torch.Generator().manual_seed(3)
    weights = [torch.randn(1, ids.shape[1], 97, generator=draw, dtype=torch.float64) for ids in texts]
    naive = student(attention=KEPT | {"impl": "naive"}).double()
    model = student(attention=KEPT).double()
    for one in (naive, model):
        for _, parameter in one.stage_parameters():
            parameter.requires_grad_(True)
    parts = [(naive(ids).logits * weight).sum() for ids, weight in zip(texts, weights, strict=True)]
    wanted = gradients(naive, sum(parts))
    if layout == "packed":
        positions = torch.cat([torch.arange(ids.shape[1]) for ids in texts])[None]
        logits = model(torch.cat(texts, 1), position_ids=positions).logits
        loss = (logits * torch.cat(weights, 1)).sum()
    else:
        longest = max(ids.shape[1] for ids in texts)
        pad = [longest - ids.shape[1] for ids in texts]
        rows = torch.cat([torch.cat([ids.new_zeros(1, n), ids], 1) for n, ids in zip(pad, texts, strict=True)])
        mask = torch.cat([torch.arange(longest)[None] >= n for n in pad]).long()
        logits = model(rows, attention_mask=mask).logits
        loss = sum((logits[b, n:] * weights[b][0]).sum() for b, n in enumerate(pad))
    for found, right in zip(gradients(model, loss), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_the_losses_of_padded_rows_are_those_of_rows_alone():
    model, rows = student(attention=KEPT), tokens(2, 40)
    model.set_attention_mode("distill", recipes(model)[0])
    alone = []
    for length, row in zip((40, 29), rows, strict=True):
        model(row[None, :length])
        alone.append(model.layer_losses())
    padded = rows.clone()
    padded[1, 29:] = 0
    mask = (torch.arange(40) < torch.tensor([[40], [29]])).long()
    for b in (0, 1):  # one row counts, the other is there
        model(padded[b : b + 1], attention_mask=mask[b : b + 1])
        torch.testing.assert_close(model.layer_losses(), alone[b], rtol=1e-4, atol=1e-6)


def test_layers_with_kept_keys_can_be_widened(tmp_path):
    model, wide = kept(), kept(wide_layers=(1,), wide_window=20)
    before = snapshot(model)
    widen(model, [1], 20)
    assert windows(model) == [8, 20, 8] and moved(before, wide) == set()
    ids = tokens(2, 60)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wide(ids).logits)
    result = train_stage0(wide, wide.key_scores(), Sequences(), arguments(tmp_path), Stage0Config(**SHORT))
    assert len(result.r2) == 3 and moved(before, wide) == scores_of(wide)
