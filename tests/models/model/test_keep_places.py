"""Other numbers of kept keys for a model whose scores are there already."""

import pytest
import torch
from tiny import student, tokens

from lizard_layers import AttentionState, LayerState
from lizard_models.model.keep_places import keep_places
from lizard_models.model.layer_configs import lizard_config

PLACES = [[5, 0], [0, 0], [2, 7]]


def kept(places, **more):
    return student(attention={"kept_keys": places, "score_dim": 12} | more)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"anchors": 0, "positions": "clamped", "position_limit": 24, "position_step": 9}])
def test_a_model_given_places_is_one_that_had_them_from_the_start(tmp_path, more):
    model, wanted, ids = kept(4, **more), kept(PLACES, **more), tokens(2, 40)
    keep_places(model, PLACES)
    own = dict(model.named_parameters())
    assert own.keys() == dict(wanted.named_parameters()).keys() and len(model.key_scores()) == 2
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            parameter.copy_(own[name])
    assert lizard_config(model.config) == lizard_config(wanted.config)
    assert model.model.moves_anchors == wanted.model.moves_anchors
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    cache = model(ids).past_key_values
    assert [type(layer.state) for layer in cache.lizard_layers()] == [LayerState, AttentionState, LayerState]
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    keep_places(model, [[1, 1], [], [0, 3]])
    assert lizard_config(model.config).attention.kept_keys == ((1, 1), (), (0, 3))


@pytest.mark.parametrize(
    "places, message",
    [
        ([[1, 2]], "kept_keys has lists for 1 layers, but the model has 3"),
        ([[1, 2], [1], [2, 2]], "one for each of its 2 key heads"),
        ([[1, 2], [3, 3], [-1, 2]], "kept_keys must not be negative"),
        ([[1, 2], [3, 0], [1, 2]], r"places: layers \[1\] have no scores of keys"),
    ],
)
def test_places_that_do_not_fit_leave_the_model_as_it_was(places, message):
    model = kept(PLACES)
    before = model.config.lizard
    with pytest.raises(ValueError, match=message):
        keep_places(model, places)
    assert model.config.lizard == before and [a.lizard.config.kept_keys for a in model.lizard_attentions()] == [
        (5, 0), 0, (2, 7),
    ]  # fmt: skip
