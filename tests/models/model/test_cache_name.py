"""A forward's cache under the name of either kind of transformers, whichever is installed."""

import inspect

import pytest
from tiny import student, tokens
from transformers.cache_utils import DynamicCache

from lizard_models.model import cache_name
from lizard_models.model.cache_name import CACHE, either_name


def forward(self, x, past_key_values=None, **kwargs):
    return x, past_key_values, kwargs


def test_the_new_name_is_taken_for_the_old_one(monkeypatch):
    monkeypatch.setattr(cache_name, "CACHE", "cache")
    taken, cache = either_name(forward), DynamicCache()
    assert (
        taken(None, 1, cache=cache) == taken(None, 1, cache) == taken(None, 1, past_key_values=cache) == (1, cache, {})
    )
    assert taken(None, 1, past_key_values=cache, cache=cache) == (1, cache, {})
    assert taken(None, 1, cache=None, mask=2) == (1, None, {"mask": 2})
    pages = object()
    assert taken(None, 1, cache=pages) == (1, None, {"cache": pages})  # to be refused by its own name
    with pytest.raises(ValueError, match="cache and past_key_values are both given"):
        taken(None, 1, past_key_values=cache, cache=DynamicCache())
    assert list(inspect.signature(taken).parameters) == ["self", "x", "past_key_values", "cache", "kwargs"]
    assert cache_name.transformers_names({"x": 1, "past_key_values": 2}) == {"x": 1, "cache": 2}


def test_with_the_old_name_nothing_is_around_a_forward(monkeypatch):
    monkeypatch.setattr(cache_name, "CACHE", "past_key_values")
    assert either_name(forward) is forward and cache_name.transformers_names({"past_key_values": 2}) == {
        "past_key_values": 2
    }


def test_a_model_takes_and_returns_its_cache_under_the_name_of_transformers():
    model, ids = student(num_hidden_layers=1), tokens(1, 9)
    outputs = model(ids[:, :8], use_cache=True)
    assert outputs[CACHE].get_seq_length() == 8
    for part in (model, model.model):
        cache = outputs[CACHE].copy()
        assert part(ids[:, 8:], **{CACHE: cache})[CACHE] is cache and cache.get_seq_length() == 9


def test_generate_goes_on_from_what_a_cache_has_read():
    """A whole text beside it is read from there on: what ``is_linear`` says decides in 5.24."""
    model, ids = student(num_hidden_layers=2), tokens(1, 20)
    cache = model(ids[:, :12], use_cache=True)[CACHE]
    settings = dict(max_new_tokens=4, do_sample=False)
    assert model.generate(ids, **{CACHE: cache}, **settings).tolist() == model.generate(ids, **settings).tolist()
    assert not any(cache.is_linear)
    beside = student(num_hidden_layers=2, softmax_layers=(1,))(ids, use_cache=True)[CACHE]
    assert beside.is_linear == [True, False]
