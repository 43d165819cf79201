"""Widening layers of a model that is converted already, and which layers are chosen."""

import pytest
import torch
from tiny import student, teacher, tokens, windows

from lizard_models import neediest_layers, widen
from lizard_models.evaluation.restoration import restoration_savings
from lizard_models.model.layer_configs import lizard_config
from lizard_models.model.positions import position_range


@torch.no_grad()
def test_a_widened_model_is_one_that_was_wide_from_the_start(tmp_path):
    changes = dict(max_position_embeddings=16)
    wide, model, ids = student(wide_layers=(1,), wide_window=21, **changes), student(**changes), tokens(2, 40)
    widen(model, [1], 21)
    assert windows(model) == [8, 21, 8] and lizard_config(model.config) == lizard_config(wide.config)
    assert model.model.position_range == wide.model.position_range == position_range(wide.config)
    assert torch.equal(model(ids).logits, wide(ids).logits)
    cache = model.new_cache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([23, 1, 16], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), wide(ids).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert windows(type(model).from_pretrained(tmp_path)) == [8, 21, 8]
    widen(model, [2])  # as wide as the others
    assert windows(model) == [8, 21, 21] and lizard_config(model.config).wide_layers == (1, 2)


@torch.no_grad()
def test_decays_of_wide_layers_are_stretched():
    changes = dict(wide_layers=(1,), wide_window=32, wide_gate_stretch=4.0)
    plain, stretched, ids = student(seed=None), student(seed=None, **changes), tokens(2, 60)
    gates = [[a.lizard.gate for a in model.lizard_attentions()] for model in (plain, stretched)]
    for layer, (narrow, wide) in enumerate(zip(*gates, strict=True)):
        x = torch.randn(1, 5, narrow.weight.shape[1])
        narrow.weight.normal_(), wide.weight.copy_(narrow.weight)
        torch.testing.assert_close(narrow(x, None) / (4 if layer == 1 else 1), wide(x, None))
    model = student(wide_gate_stretch=4.0)
    widen(model, [1], 32)
    torch.testing.assert_close(model(ids).logits, student(**changes)(ids).logits)  # starts are rounded once more
    assert not torch.equal(model(ids).logits, student(wide_layers=(1,), wide_window=32)(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(wide_gate_stretch=0.0), "wide_gate_stretch must be positive, got 0.0"),
        (
            dict(wide_gate_stretch=8.0, attention={"gate": "mamba2"}),
            "wide_gate_stretch=8.0 needs a gate with a temperature, got gate=",
        ),
    ],
)
def test_stretches_that_no_gate_has_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        student(**changes)


@pytest.mark.parametrize(
    ("changes", "layers", "window", "message"),
    [
        ({}, [3], 21, r"wide_layers=\[3\], but the model has layers 0 to 2"),
        ({}, [1], 7, "wide_window=7 must be at least attention.window=8"),
        (dict(softmax_layers=(1,)), [0, 1], 21, r"wide_layers: layers \[1\] are in softmax_layers"),
        (dict(family="mistral", sliding_window=12), [1], None, "wide_window=1024 is wider than the teacher's"),
        (dict(attention={"positions": "clamped", "position_limit": 24}), [1], 21, "position_limit=24 is less than"),
    ],
)
def test_what_cannot_be_widened_stays_as_it_was(changes, layers, window, message):
    model, ids = student(**changes), tokens(2, 40)
    before, config, reach = model(ids).logits, lizard_config(model.config), model.model.position_range
    with pytest.raises(ValueError, match=message):
        widen(model, layers, window)
    assert torch.equal(model(ids).logits, before)
    assert lizard_config(model.config) == config and model.model.position_range == reach


def test_the_layers_chosen_are_those_that_save_most():
    model, own, ids = student(), teacher(), tokens(2, 41)
    order = restoration_savings(model, own, ids)["order"]
    done: list[tuple[int, int]] = []
    assert neediest_layers(model, own, ids, 2, advance=lambda *n: done.append(n)) == sorted(order[:2])
    assert done == [(n, 6) for n in range(1, 7)]  # two texts, three layers
    assert neediest_layers(student(softmax_layers=(0,)), own, ids, 2) == [1, 2]
    for count in (0, 4):
        with pytest.raises(ValueError, match=rf"widen: got {count} layers, wanted 1 to 3, those that are converted"):
            neediest_layers(model, own, ids, count)
    with pytest.raises(ValueError, match="widen: got texts of 12 tokens to choose layers on, wanted more than the 12"):
        neediest_layers(model, own, tokens(2, 13), 1)
