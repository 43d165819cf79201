"""Layers with a wider window than the others: the same model in pieces, its memory, its files, bad lists."""

import pytest
import torch
from tiny import read_in_pieces, student, teacher, tokens, windows
from training import Sequences, arguments, recipes

from lizard_models import LizardConfig, load_state, save_state
from lizard_models.distill import held_out_errors, train_stage1
from lizard_models.evaluation.control import window_control
from lizard_models.model.positions import position_range
from lizard_models.runs.cost import run_cost
from lizard_models.runs.memory import lizard_bytes
from lizard_models.runs.model_card import _made
from lizard_models.teachers.find import Teacher

WIDE = dict(wide_layers=(1,), wide_window=21)
MADE = {"python": "3", "versions": {}, "device": "cpu", "date": "today"}
CLOSE = dict(rtol=1e-4, atol=1e-4)


def test_the_layers_named_have_the_wide_window():
    model = student(**WIDE)
    assert windows(model) == [8, 21, 8]
    everywhere, ids = student(wide_layers=(0, 1, 2), wide_window=21), tokens(2, 40)
    assert torch.equal(everywhere(ids).logits, student(window=21)(ids).logits)
    assert not torch.allclose(model(ids).logits, student()(ids).logits, **CLOSE)
    assert held_out_errors(student(seed=None, **WIDE), tokens(1, 24))[1] < 1e-9  # all of a text within the window


@torch.no_grad()
def test_pieces_steps_and_padding_equal_the_whole():
    model, ids = student(**WIDE), tokens(3, 60)
    whole = model(ids, use_cache=False).logits
    read, cache, size = read_in_pieces(model, ids, 2, 19, 45)
    torch.testing.assert_close(read, whole, **CLOSE)
    assert cache.state_bytes() == size == 3 * lizard_bytes(model.config, 60, torch.float32)
    assert lizard_bytes(model.config, 9, torch.float32) == lizard_bytes(model.config, 9**6, torch.float32)
    assert lizard_bytes(model.config, 9, torch.float32) > lizard_bytes(student().config, 9, torch.float32)
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[0, :7] = 0
    padded = model(ids, attention_mask=mask).logits[:1, 7:]
    torch.testing.assert_close(padded, model(ids[:1, 7:]).logits, **CLOSE)


@torch.no_grad()
def test_caches_and_state_files_have_each_layer_s_size(tmp_path):
    model, ids = student(**WIDE), tokens(2, 40)
    static = model.new_cache(static=True).allocate(2)
    for t in range(30):
        step = model(ids[:, t : t + 1], past_key_values=static).logits
    torch.testing.assert_close(step, model(ids[:, :30]).logits[:, -1:], **CLOSE)
    cache = model.new_cache()
    model(ids[:, :30], past_key_values=cache)
    save_state(tmp_path / "book.state", model, cache)
    rest = model(ids[:, 30:], past_key_values=load_state(tmp_path / "book.state", model)).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 30:], **CLOSE)
    others = dict(wide_layers=(1,), wide_window=22), dict(wide_layers=(2,), wide_window=21)
    for changes in ({}, *others, dict(wide_gate_stretch=2.0, **WIDE)):
        with pytest.raises(ValueError, match="made by another model: wide_"):
            load_state(tmp_path / "book.state", student(**changes))


def test_they_survive_saving_train_and_are_counted(tmp_path):
    model = student(seed=None, **WIDE)
    before = held_out_errors(model, tokens(1, 48, seed=9)).mean()
    train_stage1(model, Sequences(), arguments(tmp_path / "run"), recipes(model, steps=12)[0])
    assert held_out_errors(model, tokens(1, 48, seed=9)).mean() < before
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    assert windows(again) == [8, 21, 8]
    assert torch.equal(again(tokens(1, 40)).logits, model(tokens(1, 40)).logits)
    config = LizardConfig.preset("plain", attention={"window": 8}, **WIDE)
    assert windows(window_control(Teacher(teacher(), None, "tiny"), config)) == [8, 21, 8]
    slower = config.replace(wide_gate_stretch=8.0).to_dict()
    assert "decays slower by 8" in _made({"config": slower}, MADE)[0]
    card = _made({"config": config.to_dict()}, MADE)
    assert "window 21 in layers [1]" in card[0]
    assert position_range(student(max_position_embeddings=16, **WIDE).config).limit == 25  # window and anchors
    own = teacher().config
    assert run_cost(own, config) != run_cost(own, config.replace(wide_layers=[]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(wide_layers=(1, 1)), r"wide_layers must be distinct indices from 0, got \[1, 1\]"),
        (dict(wide_layers=(1,), softmax_layers=(0, 1)), r"wide_layers: layers \[1\] are in softmax_layers"),
        (dict(wide_layers=(1,), wide_window=7), "wide_window=7 must be at least attention.window=8"),
        (dict(wide_layers=(3,)), r"wide_layers=\[3\], but the model has layers 0 to 2"),
        (dict(wide_layers=(1,), softmax_share=0.3), r"wide_layers: layers \[1\] are kept softmax"),
        (dict(wide_layers=(1,), family="mistral", sliding_window=12), "wide_window=1024 is wider than the teacher's"),
        (
            dict(wide_layers=(1,), attention={"positions": "clamped", "position_limit": 64}),
            "position_limit=64 is less than window",
        ),
    ],
)
def test_bad_lists_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        student(**changes)
