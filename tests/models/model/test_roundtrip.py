"""Saved and loaded models: bit-equal logits, strict keys, Auto classes, nothing re-initialised."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import student, teacher, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lizard_models import LizardConfig, linearize
from lizard_models.model.families.llama import LizardLlamaConfig, LizardLlamaForCausalLM

PRESETS = ["plain", "paper", "paper_literal", "lolcats", "liger", "window_only"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_logits_are_bit_equal(tmp_path, preset, dtype):
    model, ids = student(preset).to(dtype), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LizardLlamaForCausalLM) and loaded.dtype == dtype
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {p.dtype for _, p in loaded.lizard_parameters()} <= {torch.float32}
    for (name, a), (other, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    assert LizardConfig.from_dict(loaded.config.lizard) == LizardConfig.preset(preset, attention={"window": 8})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_parameters_stay_float32_whatever_dtype_is_asked_for(tmp_path, dtype):
    model = student()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    for (_, a), (_, b) in zip(model.lizard_parameters(), loaded.lizard_parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        dict(family="mistral", sliding_window=20),
        dict(tie_word_embeddings=True),
        dict(softmax_layers=(1,)),
        dict(attention_bias=True),
        dict(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}),
    ],
    ids=["mistral", "tied", "softmax_layers", "bias", "rope"],
)
def test_every_kind_of_model_comes_back(tmp_path, changes):
    model, ids = student(**changes), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == bool(changes.get("tie_word_embeddings"))


@torch.no_grad()
def test_shards_and_the_bare_decoder(tmp_path):
    model, ids = student(), tokens(2, 30)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not list(tmp_path.glob("*.bin"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_config_alone_comes_back(tmp_path):
    student().config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is LizardLlamaConfig and config.num_key_value_heads == 2
    json.loads((tmp_path / "config.json").read_text())


def test_training_goes_on_after_loading(tmp_path):
    model = student()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.set_attention_mode("distill")
    loaded(tokens(2, 20)).loss.backward()
    assert all(p.grad is not None for _, p in loaded.lizard_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.1.self_attn.lizard.gate.bias"), "missing keys: model.layers.1.*gate.bias"),
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "missing keys: model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.update(stray=torch.zeros(1)), "unexpected keys: stray"),
    ],
)
def test_keys_are_strict(tmp_path, change, message):
    student().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_misshapen_weights_are_refused(tmp_path):
    student().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.lizard.gate.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="gate.bias|size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mismatched keys"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_teachers_checkpoint_is_not_taken_for_a_students(tmp_path):
    teacher().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no Lizard choices"):
        LizardLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_newer_config_says_so(tmp_path):
    student().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["lizard"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="version 2, this lizard-attn reads version 1: update"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_float64_is_followed_by_new_parameters(tmp_path):
    model, ids = student(seed=None).double(), tokens(1, 30)
    next(p for _, p in model.lizard_parameters()).view(-1)[0] += 1e-12  # no float32 holds it
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path, dtype="auto")):
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)  # angles are float32's
        for (name, a), (_, b) in zip(model.lizard_parameters(), loaded.lizard_parameters(), strict=True):
            assert b.dtype == torch.float64 and torch.equal(a, b), name
    made = linearize(teacher().double(), LizardConfig.preset("plain", attention={"window": 8}))
    assert {p.dtype for _, p in made.lizard_parameters()} == {torch.float64}
    torch.testing.assert_close(made(ids).logits.float(), student(seed=None)(ids).logits, rtol=1e-4, atol=1e-4)
