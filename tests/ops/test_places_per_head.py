"""Places that differ from head to head: every head is what it would be in a call of its own."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import strategies as st
from kernel_checks import DEVICE
from op_checks import examples
from test_key_expiry import in_segments, same, scores_of

from lizard_ops import ExpiryState, key_expiry, naive_key_expiry

PLACES = ((5, 0, 2), (0, 1, 9), (3, 3, 4), (0, 0, 1))
IMPLS = ("naive", "torch", "triton")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few keys, so that short sequences meet every boundary."""
    monkeypatch.setattr(importlib.import_module("lizard_ops.key_expiry.chunk_torch"), "TILE", 4)
    monkeypatch.setattr(importlib.import_module("lizard_ops.key_expiry.triton.op"), "LEAST_BLOCK", 8)


def of_head(x, h, count=None):
    """The head of [N, P, Hk] alone, with as many places as it has."""
    return None if x is None else x[:, :count, h : h + 1]


@pytest.mark.parametrize("impl", IMPLS)
def test_the_expiry_of_a_head_is_that_of_its_own_places(impl, small_tiles):
    """Of the keys, of those in a state whichever way round its places stand, and the state that is left."""
    kinds, flags = st.sampled_from(("ties", "random", "infinite")), st.booleans()

    @examples(2 if impl == "triton" and DEVICE == "cpu" else 20, kinds, st.sampled_from(PLACES), flags, flags)
    def check(kind, places, carried, packed):
        scores, options = scores_of(kind, 2, 19, 3, seed=7).to(DEVICE), (3, 1)
        more = {"output_final_state": True}
        if packed:
            scores, more["cu_seqlens"] = scores[:1], torch.tensor([0, 8, 19], device=DEVICE)
        state = None
        if carried:
            past = scores_of("ties", 2, 11, 3, seed=3).to(DEVICE)
            state = naive_key_expiry(past, *options, list(places), output_final_state=True).state
            for h, count in enumerate(places):  # in any order, among the places that a head has
                for x in (state.kept_scores, state.kept_positions):
                    x[:, :count, h] = x[:, :count, h].roll(1, 1)
        found = key_expiry(scores, *options, list(places), initial_state=state, impl=impl, **more)
        more["output_final_state"] = False
        same(key_expiry(scores, *options, places, initial_state=state, impl=impl, **more)[::2], found[::2])
        more["output_final_state"] = True
        for h, count in enumerate(places):
            alone = None
            if state is not None:
                kept = [of_head(x, h, count) for x in (state.kept_scores, state.kept_positions)]
                alone = ExpiryState(state.position, *kept, of_head(state.ring_scores, h))
            wanted = naive_key_expiry(scores[..., h : h + 1], *options, count, initial_state=alone, **more)
            same(of_head(found.expiry, h), wanted.expiry)
            for name in ("kept_scores", "kept_positions"):
                kept, blank = getattr(found.state, name), -torch.inf if name == "kept_scores" else -1
                same(of_head(kept, h, count), getattr(wanted.state, name))
                assert (kept[:, count:, h] == blank).all()
            same(of_head(found.state.ring_scores, h), wanted.state.ring_scores)
            if carried:
                wide = max(places)
                same(of_head(found.carried[:, wide:], h), wanted.carried[:, count:])
                same(of_head(found.carried, h, count), wanted.carried[:, :count])


@pytest.mark.parametrize("impl", ("naive", "torch"))
def test_expiries_in_segments_are_the_whole(impl, small_tiles):
    scores, options = scores_of("ties", 1, 19, 3).to(DEVICE), (3, 1, (4, 0, 1))
    whole = naive_key_expiry(scores, *options, output_final_state=True)
    for cuts in ([5, 6, 11], range(1, 19)):
        same(in_segments(scores, options, cuts, impl), whole[:2])


def test_as_many_places_for_each_are_the_number():
    scores = scores_of("ties", 2, 19, 3).to(DEVICE)
    for impl in IMPLS[:2]:
        more = {"output_final_state": True, "impl": impl}
        same(key_expiry(scores, 3, 1, [4, 4, 4], **more), key_expiry(scores, 3, 1, 4, **more))
        same(key_expiry(scores, 3, 1, (0, 0, 0), **more), key_expiry(scores, 3, 1, 0, **more))


@pytest.mark.parametrize(
    "places, message",
    [
        ([1, 2], "kept_keys: got [1, 2], wanted an integer >= 0, or 3 >= 0: one a key head"),
        ([1, 2, -1], "kept_keys: got [1, 2, -1], wanted an integer >= 0, or 3 >= 0"),
        ([1, 2, 3.0], "kept_keys: got [1, 2, 3.0], wanted"),
        ([1, 2, True], "kept_keys: got [1, 2, True], wanted"),
        ("many", "kept_keys: got 'many', wanted"),
    ],
)
def test_places_that_do_not_fit_the_heads_are_refused(places, message):
    with pytest.raises(ValueError) as error:
        key_expiry(torch.zeros(1, 5, 3), 2, 0, places)
    assert str(error.value).startswith(message)


def test_a_head_with_more_keys_than_places_is_refused():
    state = naive_key_expiry(torch.zeros(1, 9, 2), 2, 0, 3, output_final_state=True).state
    with pytest.raises(ValueError, match="initial_state.kept_positions: got .* at most .3, 1. keys in a key head"):
        key_expiry(torch.zeros(1, 5, 2), 2, 0, (3, 1), initial_state=state)
