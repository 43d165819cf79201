"""Scores, places and states with kept keys that do not fit: a ValueError that names the argument."""

from __future__ import annotations

import pytest
import torch
from test_arguments import FORMS, HK, HQ, B, F, T, tensors

import lizard_ops

SCORED = {"scores": torch.rand(B, T, HK), "kept_keys": 2, "window": 2, "coverage": "outside"}
NONE_OF_SCORES = {"scores": None, "kept_keys": None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": torch.rand(B, T)}, "scores: got shape"),
        ({"scores": torch.rand(B, T, HQ)}, "scores: got shape"),
        ({"scores": torch.ones(B, T, HK, dtype=torch.int64)}, "scores: got shape"),
        ({"scores": torch.rand(B, T, HK, device="meta")}, "scores: got shape"),
        ({"scores": torch.full((B, T, HK), torch.nan)}, f"scores: got {B * T * HK}, wanted scores that are not NaN"),
        ({"kept_keys": None}, "kept_keys: got None, wanted a number >= 1 with scores"),
        ({"kept_keys": 0}, "kept_keys: got 0, wanted an integer >= 1"),
        ({"scores": None}, "kept_keys: got 2, wanted a number with expiry, None without"),
        ({"kept_keys": 2.0}, "kept_keys: got 2.0, wanted an integer >= 1"),
        ({"score_delay": -1}, "score_delay: got -1, wanted an integer >= 0"),
        ({"score_delay": 2}, "score_delay: got 2, wanted less than the window, 2"),
        ({"score_delay": 2} | NONE_OF_SCORES, "score_delay: got 2, wanted less than the window, 2"),
    ],
)
@pytest.mark.parametrize("form", FORMS["hybrid"])
def test_bad_scores_are_refused_by_name(form, changes, message):
    with pytest.raises(ValueError) as error:
        getattr(lizard_ops, form)(**(tensors("hybrid") | SCORED | changes))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "form, changes, message",
    [
        ("chunk_hybrid_attn", {"expiry": torch.full((B, T, HK), 9)}, "expiry: got shape"),
        ("chunk_hybrid_attn", {"gate_form": "absorbed"}, "gate_form: got 'absorbed', wanted \"stable\" with scores"),
        (
            "recurrent_hybrid_attn",
            {"impl": "triton", "g": -torch.rand(B, T, HK, F)},
            'impl: got \'triton\', wanted "torch" or "auto" for a gate per channel with kept keys',
        ),
    ],
)
def test_what_does_not_fit_scores_is_refused_by_name(form, changes, message):
    with pytest.raises(ValueError) as error:
        getattr(lizard_ops, form)(**(tensors("hybrid") | SCORED | changes))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "before, after, field",
    [
        ({}, NONE_OF_SCORES, "log_scale: got shape"),
        (NONE_OF_SCORES, {}, "log_scale: got None"),
        ({"coverage": "all"}, {"coverage": "all"} | NONE_OF_SCORES, "kept_k: got shape"),
        ({"coverage": "all"} | NONE_OF_SCORES, {"coverage": "all"}, "kept_k: got None"),
        ({}, {"kept_keys": 3}, "kept_k: got shape"),
        ({}, {"score_delay": 1}, "ring_scores: got shape"),
        ({"g": None}, {"g": -torch.rand(B, T)}, "ring_g: got None"),
    ],
)
@pytest.mark.parametrize("form", FORMS["hybrid"])
def test_a_state_of_other_kept_keys_is_refused(form, before, after, field):
    function = getattr(lizard_ops, form)
    state = function(**(tensors("hybrid") | SCORED | before), output_final_state=True)[1]
    with pytest.raises(ValueError) as error:
        function(**(tensors("hybrid") | SCORED | after), initial_state=state)
    assert str(error.value).startswith(f"initial_state.{field}")


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda s: {"kept_positions": s.kept_positions + 4}, "kept_positions: got"),
        (lambda s: {"kept_positions": s.kept_positions.int()}, "kept_positions: got shape"),
        (lambda s: {"kept_scores": s.kept_scores.double()}, "kept_scores: got shape"),
        (lambda s: {"ring_scores": s.ring_scores.half()}, "ring_scores: got shape"),
    ],
)
def test_kept_keys_that_are_none_are_refused(change, field):
    given = tensors("hybrid") | SCORED
    state = lizard_ops.chunk_hybrid_attn(**given, output_final_state=True)[1]
    with pytest.raises(ValueError) as error:
        lizard_ops.recurrent_hybrid_attn(**given, initial_state=state._replace(**change(state)))
    assert str(error.value).startswith(f"initial_state.{field}")
