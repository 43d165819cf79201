"""Presets: the paper's recipe to the last number, JSON there and back, no unknown keys; each trains and generates."""

import json

import pytest
import torch
from tiny import student, tokens

from lizard_models import LizardConfig
from lizard_models.presets import PRESETS

NAMES = ["paper", "paper_literal", "plain", "recommended", "lolcats", "liger", "window_only"]


def test_names():
    assert sorted(PRESETS) == sorted(NAMES)
    assert all(LizardConfig.preset(name).name == name for name in NAMES)
    with pytest.raises(ValueError, match="unknown preset 'papr', choose one of paper, "):
        LizardConfig.preset("papr")


def test_the_papers_recipe():
    paper = LizardConfig.preset("paper")
    for stage, rate in ((paper.stage1, 1e-3), (paper.stage2, 5e-4)):
        assert stage.learning_rate == rate
        assert (stage.dataset, stage.examples, stage.epochs) == ("yahma/alpaca-cleaned", 50_000, 2.0)
        assert (stage.sequence_length, stage.batch_size, stage.precision) == (2048, 8, "bf16")
        assert (stage.betas, stage.eps, stage.max_grad_norm) == ((0.9, 0.99), 1e-8, 1.0)
        assert (stage.warmup_ratio, stage.min_learning_rate_ratio) == (0.1, 0.1)
        assert stage.weight_decay == 0.0 and stage.max_steps is None
    assert (paper.stage1.error, paper.stage1.inputs) == ("mse", "teacher")
    assert (paper.stage2.lora_rank, paper.stage2.lora_alpha, paper.stage2.lora_dropout) == (8, 16, 0.0)
    assert paper.stage2.lora_targets == ("q_proj", "k_proj", "v_proj")
    assert (paper.stage2.cross_entropy_weight, paper.stage2.kl_weight) == (1.0, 0.0)
    attention = paper.attention
    assert (attention.window, attention.num_sinks, attention.feature_dim) == (128, 4, 128)
    assert (attention.feature_activation, attention.gate, attention.coverage) == ("softmax", "scalar", "all")
    assert not attention.window_rope and not attention.linear_rope and attention.normalize


def test_the_recommended_form():
    recommended = LizardConfig.preset("plain")
    attention, stage1 = recommended.attention, recommended.stage1
    assert (attention.window, attention.anchors, attention.num_sinks) == (128, 4, 0)
    assert attention.window_rope and not attention.linear_rope and attention.coverage == "outside"
    assert (attention.feature_activation, attention.feature_projection) == ("softmax", "per_head")
    assert (attention.feature_dim, attention.feature_dim_counts, stage1.target) == (128, "projection", "output")
    assert (attention.key_map, attention.tie_features) == ("key_head", False)
    assert (attention.gate, attention.gate_init) == ("key_head", 0.985)
    assert (attention.mix, attention.merge_bias) == ("merge", "head_and_token")
    assert (stage1.error, stage1.learning_rate, stage1.gate_learning_rate) == ("relative", 1e-2, 1e-3)
    kept = LizardConfig.preset("recommended")
    attention, stage0 = kept.attention, kept.stage0
    assert (attention.kept_keys, attention.coverage, attention.score_received) == (608, "left", True)
    assert (
        stage0.share_places
        and stage0.max_steps == 240
        and (kept.stage1.sequence_length, kept.stage2.sequence_length) == (4096, 4096)
    )
    control = LizardConfig.preset("window_only").attention
    assert not control.linear_branch and (control.window, control.anchors) == (128, 4)


@pytest.mark.parametrize("name", NAMES)
def test_json_there_and_back(name):
    config = LizardConfig.preset(name, softmax_layers=[0, 5])
    assert config.softmax_layers == (0, 5)
    assert LizardConfig.from_json(config.to_json()) == config
    assert LizardConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_replace_changes_what_it_names():
    before = LizardConfig.preset("plain")
    after = LizardConfig.preset("plain", attention={"window": 64}, stage1={"max_steps": 7})
    assert after.attention.window == 64 and after.attention.anchors == 4
    assert after.stage1.max_steps == 7 and after.stage1.batch_size == before.stage1.batch_size
    assert after.stage2 == before.stage2 and before.attention.window == 128


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windw": 3}, "unknown keys in Lizard config: windw"),
        ({"attention": {"windw": 3}}, "unknown keys in Lizard config: attention.windw"),
        ({"stage1": {"lr": 3}}, "unknown keys in Lizard config: stage1.lr"),
        ({"version": 2}, "has version 2, this lizard-attn reads version 1"),
        ({"attention": {"window": "wide"}}, "window must be int, got 'wide'"),
        ({"attention": 3}, "attention must be AttentionChoices, got 3"),
        ({"softmax_layers": [1, 1]}, "must be distinct indices"),
        ({"softmax_layers": [-1]}, "must be distinct indices"),
        ({"stage1": {"max_steps": 3}}, "give one of epochs and max_steps"),
        ({"stage1": {"batch_size": 0}}, "batch_size must be positive"),
        ({"stage1": {"weight_decay": -1}}, "weight_decay must not be negative"),
        ({"stage1": {"error": "rms"}}, "error must be"),
        ({"stage2": {"lora_rank": 0}}, "lora_rank must be at least 1"),
        ({"stage2": {"new_learning_rate": 0.0}}, "new_learning_rate must be positive or None, got 0.0"),
        ({"stage2": {"cross_entropy_weight": 0}}, "nor both zero"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        LizardConfig.from_dict(values)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_trains_and_generates(name):
    model = student(name, seed=None)
    ids = tokens(2, 30)
    trained = [
        p.requires_grad_()
        for n, p in model.named_parameters()
        if ".key_score." not in n and (".lizard." in n or "q_proj" in n)
    ]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 35)
