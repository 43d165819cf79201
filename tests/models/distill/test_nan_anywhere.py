"""A NaN, put into each of fourteen places of a run's fourth step, is seen in that step, by name, and in no file."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models.distill import train_stage1, train_stage2, trainer
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.distill.stage2 import LanguageModelling
from lizard_models.files.weights import nonfinite

STEP = 4


def named(objective, ending: str) -> torch.Tensor:
    return next(p for name, p in objective.named_parameters() if name.endswith(ending)).data


def weight(ending: str):
    def spoil(objective, loss):
        named(objective, ending)[..., 3] = torch.nan
        return loss

    return spoil


def hidden(objective, loss):
    """What a layer puts out, in this forward and those after it."""
    model = next(m for m in objective.modules() if hasattr(m, "layers"))
    model.layers[1].register_forward_hook(lambda module, inputs, output: output * torch.nan)
    return loss


def gradient(objective, loss):
    parameter = next(
        p for name, p in objective.named_parameters() if name.endswith("layers.1.self_attn.lizard.gate.weight")
    )
    return loss + (0 * parameter.sum()).sqrt()  # 0, with a gradient of 0 times infinity


def in_forward(monkeypatch, kind, spoil, calls_a_step: int = 1):
    """Before the fourth step's forward, or to its loss."""
    plain, calls = kind.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == STEP * calls_a_step and spoil is not gradient and spoil is not None:
            spoil(self, None)
        loss = plain(self, *args, **kwargs)["loss"]
        if len(calls) == STEP * calls_a_step:
            loss = gradient(self, loss) if spoil is gradient else loss * torch.nan if spoil is None else loss
        return {"loss": loss}

    monkeypatch.setattr(kind, "forward", forward)


def in_update(monkeypatch, spoil):
    """Around the fourth step's update."""
    plain, calls = torch.optim.AdamW.step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        return spoil(self, plain, args, kwargs) if len(calls) == STEP else plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def average(optimizer, plain, args, kwargs):
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].flatten()[0] = torch.nan
    return plain(optimizer, *args, **kwargs)


def rate(optimizer, plain, args, kwargs):
    optimizer.param_groups[0]["lr"] = float("nan")
    return plain(optimizer, *args, **kwargs)


def after(optimizer, plain, args, kwargs):
    done = plain(optimizer, *args, **kwargs)
    optimizer.param_groups[0]["params"][-1].data.flatten()[-1] = torch.inf
    return done


GATE = "model.layers.1.self_attn.lizard.gate.weight"
IN_GATE = f", its gradient is not finite in model.{GATE}"
PLACES = {
    "embedding": (1, weight("embed_tokens.weight"), "at step 4, for model.model.embed_tokens.weight is not finite"),
    "frozen projection": (
        1,
        weight("layers.2.self_attn.k_proj.weight"),
        "at step 4, for model.model.layers.2.self_attn.",
    ),
    "frozen norm": (2, weight("layers.0.input_layernorm.weight"), "layers.0.input_layernorm.weight is not finite"),
    "head": (2, weight("lm_head.weight"), "at step 4, for adapted.base_model.model.lm_head.weight is not finite"),
    "feature map": (
        1,
        weight("layers.1.self_attn.lizard.feature_maps.query_map.weight"),
        "feature_maps.query_map.weight is not",
    ),
    "gate": (2, weight("layers.0.self_attn.lizard.gate.weight"), "self_attn.lizard.gate.weight is not finite"),
    "adapter": (2, weight("layers.1.self_attn.v_proj.lora_B.default.weight"), "v_proj.lora_B.default.weight is not"),
    "hidden state": (1, hidden, "at step 4, first after model.model.layers.1 ("),
    "loss": (2, None, "is nan at step 4, "),
    "gradient": (1, gradient, "at step 4" + IN_GATE),
    "gradient of the second part of a batch": (1, gradient, "at step 4" + IN_GATE),
    "AdamW's average": (1, average, "not finite after step 4: "),
    "learning rate": (2, rate, "not finite after step 4: "),
    "updated weight": (1, after, "not finite after step 4: "),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_nan_is_seen_in_its_step(tmp_path, monkeypatch, place):
    stage, spoil, said = PLACES[place]
    parts = 2 if "second part" in place else 1

    def train(model, **changes):
        run = arguments(tmp_path / "run", save_steps=1, micro_batch_size=2 // parts, **changes)
        recipe = recipes(model, steps=6)[stage - 1]
        recipe = dataclasses.replace(recipe, kl_weight=0.5) if stage == 2 else recipe
        return (train_stage1 if stage == 1 else train_stage2)(model, Sequences(), run, recipe)

    with monkeypatch.context() as spoiled, pytest.raises(FloatingPointError) as raised:
        if spoil in (average, rate, after):
            in_update(spoiled, spoil)
        else:
            in_forward(spoiled, AttentionTransfer if stage == 1 else LanguageModelling, spoil, parts)
        train(fresh())
    assert said in str(raised.value) and "checkpoint-3" in str(raised.value)
    kept = trainer.checkpoints(tmp_path / "run")
    assert [path.name for path in kept] == ["checkpoint-2", "checkpoint-3"]
    assert all(nonfinite(load_file(path / trainer.TRAINED)) == [] for path in kept)
    again = fresh()
    train(again, resume=True)
    assert moved(snapshot(again), again) == set() and nonfinite(dict(again.state_dict())) == []


def test_weights_are_looked_at_without_waiting(tmp_path, monkeypatch):
    """One reading a step of the largest weight, by the same queue as losses."""
    seen = []
    plain = trainer.FiniteWatch._read

    def read(self, number, names, norms, readings):
        seen.append((number, len(names), readings.shape[0]))
        return plain(self, number, names, norms, readings)

    monkeypatch.setattr(trainer.FiniteWatch, "_read", read)
    model = fresh()
    train_stage1(model, Sequences(), arguments(tmp_path), recipes(model, steps=2)[0])
    count = len(dict(model.stage_parameters()))
    assert seen == [(1, count, 2), (1, count, 1), (2, count, 2), (2, count, 1)]
