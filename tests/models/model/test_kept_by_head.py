"""Models whose layers and key heads keep different numbers of keys: every move of a cache, files, and what is said."""

import io

import pytest
import torch
from rich.console import Console
from tiny import student, teacher, tokens
from transformers import AutoModelForCausalLM

from lizard_layers import AttentionState, LayerState
from lizard_models import LizardConfig, linearize, load_state, save_state
from lizard_models.model.layer_configs import attention_config, kept_by_layer
from lizard_models.runs.memory import describe, kept_bytes, lizard_bytes, told_places
from lizard_models.runs.model_card import write_model_card

BY_LAYER = [[5, 0], [0, 0], [2, 7]]


def kept(places=BY_LAYER, **attention):
    return student(attention={"kept_keys": places, "score_dim": 12} | attention)


@torch.no_grad()
@pytest.mark.parametrize(
    "places, choices",
    [
        (BY_LAYER, {}),
        ([3, 0], {"gate": "scalar", "coverage": "all", "mix": "sum", "merge_bias": "none"}),
        (BY_LAYER, {"gate": "channel", "feature_activation": "exp", "key_map": "query_head", "score_received": True}),
        (BY_LAYER, {"positions": "clamped", "position_limit": 24, "position_step": 10}),
    ],
    ids=["plain", "beside all", "channel", "clamped"],
)
def test_prefill_in_pieces_and_steps_equals_one_shot(places, choices):
    model, ids = kept(places, **choices), tokens(2, 50)
    whole = model(ids, use_cache=False).logits
    for sizes in ([50], [3, 17, 1, 29], [20] + [1] * 30):
        cache = model.new_cache()
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-4)
        assert cache.state_bytes() == 2 * lizard_bytes(model.config, 1, torch.float32)
    kinds = [type(layer.state) for layer in cache.lizard_layers()]
    assert kinds == [AttentionState if places == BY_LAYER and i == 1 else LayerState for i in range(3)]


@torch.no_grad()
def test_a_head_without_places_is_a_window_head():
    """A layer without any computes what it does in a model without kept keys, and has no score."""
    model, ids = kept([[0, 0], [0, 0], [0, 0]]), tokens(2, 40)
    assert not list(model.key_scores())
    torch.testing.assert_close(model(ids).logits, student().eval()(ids).logits, rtol=0, atol=0)


@torch.no_grad()
def test_padded_rows_beams_and_static_caches():
    model, ids = kept(), tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[0, 13:], model(ids[:1, 13:]).logits[0], rtol=1e-4, atol=2e-4
    )
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    static = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(plain, static)
    assert model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False).shape == (2, 44)


@torch.no_grad()
def test_a_saved_model_and_its_state_files_keep_their_places(tmp_path):
    model, ids = kept(), tokens(1, 40)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert kept_by_layer(loaded.config) == [tuple(heads) for heads in BY_LAYER]
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in model.named_parameters()}
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    save_state(tmp_path / "text.state", model, model(ids).past_key_values)
    wanted = model(torch.cat([ids, tokens(1, 3)], 1)).logits[:, 40:]
    again = load_state(tmp_path / "text.state", loaded)
    torch.testing.assert_close(loaded(tokens(1, 3), past_key_values=again).logits, wanted, rtol=1e-4, atol=2e-4)
    with pytest.raises(ValueError, match=r"another model: attention.kept_keys=\[\[5, 0\], .*, here \[\[5, 0\], \[0, 1"):
        load_state(tmp_path / "text.state", kept([[5, 0], [0, 1], [2, 7]]))


def test_configs_come_back_from_json():
    config = LizardConfig.preset("plain", attention={"kept_keys": BY_LAYER})
    assert config.attention.kept_keys == ((5, 0), (0, 0), (2, 7)) and config.attention.keeps_keys
    assert LizardConfig.from_json(config.to_json()) == config
    assert config.replace(attention={"window": 64}).attention.kept_keys == config.attention.kept_keys


@pytest.mark.parametrize(
    "places, changes, message",
    [
        ([[1, 2], [3, 4]], {}, "kept_keys has lists for 2 layers, but the model has 3"),
        ([[1, 2], [3, 4], [5]], {}, r"must be a number or one for each of its 2 key heads, got \(5,\)"),
        ([1, 2, 3], {}, r"must be a number or one for each of its 2 key heads, got \(1, 2, 3\)"),
        ([[1, 2], [3, -4], [5, 6]], {}, "kept_keys must not be negative"),
        (BY_LAYER, {"softmax_layers": (2,)}, r"kept_keys: layers \[2\] are kept softmax or sliding"),
        ([[1, 2], 3, 4], {}, "kept_keys must be int .* got"),
    ],
)
def test_places_that_do_not_fit_the_model_are_refused(places, changes, message):
    with pytest.raises(ValueError, match=message):
        linearize(teacher(), LizardConfig.preset("plain", attention={"kept_keys": places}).replace(**changes))


def test_layers_kept_softmax_have_no_places():
    model = student(attention={"kept_keys": [[5, 0], [0, 3], []]}, softmax_layers=(2,))
    assert [attention_config(model.config, i).kept_keys for i in (0, 1)] == [(5, 0), (0, 3)]
    ids = tokens(1, 30)
    assert model(ids).logits.isfinite().all()


def test_what_is_said_of_their_memory(tmp_path):
    model = kept()
    model.save_pretrained(tmp_path / "model")
    wanted = "0 to 7 of a key head, 14 in all, in 2 of 3 linearized layers"
    assert told_places(model.config) == wanted
    out = io.StringIO()
    for part in describe(str(tmp_path / "model")):
        Console(file=out, width=120).print(part)
    assert f"kept keys: {wanted}" in out.getvalue()
    card = write_model_card(tmp_path / "model").read_text()
    assert f"kept keys: {wanted}: layer 0: 5 0; layer 1: 0 0; layer 2: 2 7" in card
    assert f"kept keys take {kept_bytes(model.config, torch.float32):,}" in card
    assert told_places(kept(4).config) == "4 of each key head in every linearized layer"


def test_bytes_are_those_of_the_places():
    """A place of one head takes a share of what a place of all heads takes, wherever it is."""
    of = {places: kept_bytes(kept(places).config, torch.float32) for places in (1, 2, ((3, 0),) * 3, ((0, 1),) * 3)}
    one = (of[2] - of[1]) // 6
    assert of[2] - of[1] == 6 * one and of[((3, 0),) * 3] - of[((0, 1),) * 3] == 3 * 2 * one
