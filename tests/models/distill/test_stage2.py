"""Stage 2: LoRA and the new parameters, on cross-entropy and KL; the result is an ordinary Lizard."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, student, teacher, tokens
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models.distill import TrainingInterrupted, train_stage1, train_stage2
from lizard_models.distill.full_weights import FullWeights
from lizard_models.distill.stage2 import LanguageModelling
from lizard_models.model import norms
from lizard_models.model.families.llama import LizardLlamaForCausalLM
from lizard_models.presets import PRESETS
from lizard_models.recipes import Stage2Config


def test_projections_and_new_parameters_learn_and_the_adapters_go(tmp_path):
    model = fresh()
    before = snapshot(model)
    recipe = recipes(model, steps=20)[1]
    tuned, result = train_stage2(model, Sequences(), arguments(tmp_path / "run"), recipe)
    assert tuned is model and type(tuned) is LizardLlamaForCausalLM and set(snapshot(tuned)) == set(before)
    changed = moved(before, tuned)
    projections = {name for name in before if name.endswith(tuple(f"{p}.weight" for p in recipe.lora_targets))}
    assert len(projections) == len(recipe.lora_targets) * len(model.model.layers)
    assert changed == projections | {name for name, _ in tuned.lizard_parameters()}
    assert result.losses[-1][1] < result.losses[0][1]
    assert not tuned.training and not any(p.requires_grad for p in tuned.parameters())

    tuned.save_pretrained(tmp_path / "saved")
    back = LizardLlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = tokens(1, 40)
    assert torch.equal(back(ids).logits, tuned(ids).logits)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_loss_is_that_of_teacher_and_student_apart(weights):
    reference, model = teacher(), student()
    ids = tokens(2, 40)
    logits = model(ids).logits[:, :-1]
    entropy = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    wanted = reference(ids).logits[:, :-1].log_softmax(-1)
    divergence = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1).mean()

    recipe = dataclasses.replace(recipes(model)[1], cross_entropy_weight=weights[0], kl_weight=weights[1])
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    torch.nn.init.zeros_(adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    loss = LanguageModelling(adapted, recipe)(ids)["loss"]
    torch.testing.assert_close(loss, weights[0] * entropy + weights[1] * divergence)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_stays_the_teacher_while_adapters_move(family):
    reference, model = teacher(family), student(family=family)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    inputs = {"input_ids": tokens(1, 40), "use_cache": False}
    hidden = LanguageModelling(adapted, recipes(model)[1])._teacher_hidden(model, inputs)
    torch.testing.assert_close(hidden, reference.model(**inputs).last_hidden_state)
    assert model.mode == "student" and not torch.allclose(hidden, model.model(**inputs).last_hidden_state)


def test_new_parameters_can_be_left_alone(tmp_path):
    model = fresh()
    before = snapshot(model)
    recipe = dataclasses.replace(recipes(model)[1], train_new_parameters=False, lora_targets=("v_proj",))
    tuned, _ = train_stage2(model, Sequences(), arguments(tmp_path), recipe)
    assert {name.rpartition("self_attn.")[2] for name in moved(before, tuned)} == {"v_proj.weight"}


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    recipe = recipes(fresh(), steps=5)[1]
    whole, _ = train_stage2(fresh(), Sequences(), arguments(tmp_path / "a"), recipe)
    stopped, before = fresh(), snapshot(fresh())
    with pytest.raises(TrainingInterrupted):
        train_stage2(stopped, Sequences(stop_at=5), arguments(tmp_path / "b"), recipe)
    assert set(snapshot(stopped)) == set(before)  # the adapters are gone
    again, _ = train_stage2(fresh(), Sequences(), arguments(tmp_path / "b", resume=True), recipe)
    assert moved(snapshot(whole), again) == set()


def test_recomputing_layers_changes_nothing(tmp_path):
    tuned = []
    for recompute in (False, True):
        model = fresh()
        run = arguments(tmp_path / str(recompute), gradient_checkpointing=recompute)
        tuned.append(train_stage2(model, Sequences(), run, recipes(model, steps=2)[1])[0])
        assert not any(getattr(part, "gradient_checkpointing", False) for part in model.modules())  # left as it came
    for name, value in snapshot(tuned[0]).items():
        torch.testing.assert_close(dict(tuned[1].named_parameters())[name], value)


def test_unknown_projections_are_named(tmp_path):
    model = fresh()
    recipe = dataclasses.replace(recipes(model)[1], lora_targets=("q_proj", "w_proj"))
    with pytest.raises(ValueError, match="lora_targets: the model has no w_proj"):
        train_stage2(model, Sequences(), arguments(tmp_path), recipe)
    recipe = dataclasses.replace(recipe, lora_targets=("lm_head",))
    with pytest.raises(ValueError, match="lm_head .* cannot be adapted"):
        train_stage2(model, Sequences(), arguments(tmp_path), recipe)


@pytest.mark.parametrize(
    "preset, family", [*((preset, "llama") for preset in PRESETS), ("plain", "mistral"), ("liger", "mistral")]
)
def test_every_preset_trains_and_generates(preset, family, tmp_path):
    """On the same two texts again: the loss begins where teacher and student apart have it, and falls."""
    model, data = fresh(preset, family=family), Sequences(count=2)
    stage1, stage2 = recipes(model, steps=3)
    new = {name for name, _ in model.stage_parameters()}  # scores of keys stay as stage 0 leaves them
    if new:
        train_stage1(model, data, arguments(tmp_path / "1"), stage1)
    before = snapshot(model)
    with torch.no_grad():
        logits, wanted = (m(data.rows).logits[:, :-1].log_softmax(-1) for m in (model, teacher(family)))
    entropy = F.nll_loss(logits.flatten(0, 1), data.rows[:, 1:].flatten())
    divergence = F.kl_div(logits, wanted, log_target=True, reduction="none").sum(-1).mean()
    tuned, result = train_stage2(model, data, arguments(tmp_path / "2"), stage2)
    losses = [loss for _, loss in result.losses]
    start = stage2.cross_entropy_weight * entropy + stage2.kl_weight * divergence
    assert losses[0] == pytest.approx(start.item(), rel=1e-3)
    assert len(losses) == 3 and losses[-1] < losses[0] and result.final_loss == pytest.approx(losses[-1])
    changed = moved(before, tuned)
    assert {name for name in changed if ".lizard." not in name} == {
        name for name in before if name.endswith(tuple(f"{p}.weight" for p in stage2.lora_targets))
    }
    assert {name for name in changed if ".lizard." in name} == (new if stage2.train_new_parameters else set())
    written = tuned.generate(tokens(2, 30), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    greedy = tuned(written, use_cache=False).logits[:, 29:33].argmax(-1)
    assert torch.equal(written[:, 30:], greedy)


def test_the_seed_alone_decides_where_adapters_begin(tmp_path):
    """Whatever the process has drawn before."""
    found = []
    for n, (drawn, seed) in enumerate([(5, 0), (6, 0), (5, 1)]):
        model = fresh()
        recipe = dataclasses.replace(recipes(model, steps=1)[1], seed=seed, train_new_parameters=False)
        torch.manual_seed(drawn)
        data = Sequences(count=2)  # one batch, whatever the order
        found.append(snapshot(train_stage2(model, data, arguments(tmp_path / str(n)), recipe)[0]))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(found[0][n], x) for n, x in found[1].items())
    assert not torch.equal(found[0][name], found[2][name])


def test_whole_projections_learn_and_stay_ordinary_weights(tmp_path):
    model = fresh()
    before = snapshot(model)
    recipe = dataclasses.replace(
        recipes(model, steps=20)[1], trained="full", learning_rate=1e-3, lora_targets=("q_proj", "down_proj"),
        cross_entropy_weight=0.5, kl_weight=1.0,
    )  # fmt: skip
    tuned, result = train_stage2(model, Sequences(), arguments(tmp_path), recipe)
    assert tuned is model and type(tuned) is LizardLlamaForCausalLM and set(snapshot(tuned)) == set(before)
    projections = {name for name in before if name.endswith(("q_proj.weight", "down_proj.weight"))}
    assert moved(before, tuned) == projections | {name for name, _ in tuned.lizard_parameters()}
    assert result.parameters == sum(before[name].numel() for name in moved(before, tuned))
    assert result.losses[-1][1] < result.losses[0][1]
    assert type(tuned.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_whole_projections_leave_the_teacher_as_it_was_and_keep_small_updates():
    model, inputs = student().bfloat16(), {"input_ids": tokens(1, 40), "use_cache": False}
    model.set_attention_mode("teacher")
    reference = model.model(**inputs).last_hidden_state
    model.set_attention_mode("student")
    changed = FullWeights(model, ("q_proj", "v_proj"))
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with torch.no_grad():
        for change in changed.changes():
            for _ in range(1000):
                change.delta += 1e-4  # each too small for a bfloat16 weight
    moved_by = (model.model.layers[0].self_attn.q_proj.weight - before).float()
    assert (moved_by - 0.1).abs().max() < 0.01
    hidden = LanguageModelling(changed, recipes(model)[1])._teacher_hidden(model, inputs)
    assert torch.equal(hidden, reference)
    assert changed.unload() is model and torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_a_run_on_whole_projections_goes_on_as_if_it_had_not_stopped(tmp_path):
    recipe = dataclasses.replace(recipes(fresh(), steps=5)[1], trained="full")
    whole, _ = train_stage2(fresh(), Sequences(), arguments(tmp_path / "a"), recipe)
    stopped, before = fresh(), snapshot(fresh())
    with pytest.raises(TrainingInterrupted):
        train_stage2(stopped, Sequences(stop_at=5), arguments(tmp_path / "b"), recipe)
    assert set(snapshot(stopped)) == set(before)
    again, _ = train_stage2(fresh(), Sequences(), arguments(tmp_path / "b", resume=True), recipe)
    assert not moved(snapshot(whole), again)


def test_whole_projections_refuse_what_belongs_to_adapters(tmp_path):
    recipe = recipes(fresh())[1]
    with pytest.raises(ValueError, match="lora_dropout=0.1 belongs to adapters"):
        dataclasses.replace(recipe, trained="full", lora_dropout=0.1)
    with pytest.raises(ValueError, match="fsdp"):
        full = dataclasses.replace(recipe, trained="full")
        train_stage2(fresh(), Sequences(), arguments(tmp_path, fsdp=True), full)


def test_the_teacher_inside_takes_the_kernels_of_its_norms(monkeypatch):
    """As if on a GPU: every norm, with the sum before it, and nothing else of the loss."""
    calls = []
    for name in ("rms_norm", "add_rms_norm"):
        op = getattr(norms, name)
        monkeypatch.setattr(norms, name, lambda *a, op=op, **k: calls.append(1) or op(*a, **k))
    model = fresh().requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    objective, ids = LanguageModelling(adapted, Stage2Config(kl_weight=1.0)).train(), tokens(2, 24)
    with torch.no_grad():
        family = objective._teacher_hidden(model, {"input_ids": ids, "use_cache": False})
        assert not calls
        monkeypatch.setattr(norms, "on_gpu", lambda x: True)
        found = objective._teacher_hidden(model, {"input_ids": ids, "use_cache": False})
    torch.testing.assert_close(found, family)
    assert len(calls) == 2 * len(model.model.layers) + 1 and model.mode == "student"
