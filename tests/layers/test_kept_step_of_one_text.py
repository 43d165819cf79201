"""A step of one text on a CPU with kept keys: what the whole text gives, at every position, through one op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from layer_checks import inputs, layer

from lizard_layers import hybrid_attention, map_state, tensors_of
from lizard_layers.one_text import text_step_of

KEPT = dict(coverage="left", score_received=True, score_dim=6, merge_bias="head_and_token")
FORMS = {
    "recommended": dict(kept_keys=3, anchors=2, score_stride=2),
    "a number for each head": dict(kept_keys=(4, 1), anchors=2, score_stride=3),
    "none for a head": dict(kept_keys=(0, 3), anchors=1, score_stride=1),
    "no anchors, one gate": dict(kept_keys=2, gate="scalar", score_stride=8),
    "soft caps": dict(kept_keys=3, anchors=2, softcap=2.0, scale=0.4, feature_scale=0.3, gate_temperature=2.0),
    "no bias": dict(kept_keys=3, anchors=7, merge_bias_init=1.0, score_stride=2),
}
LENGTH = 40


def made_of(form, window=5, **changes):
    choices = KEPT | FORMS.get(form, {}) | changes
    shape = {name: choices.pop(name) for name in ("scale", "softcap") if name in choices}
    return layer("", window=window, **choices, **shape)


def begun(made, *given):
    """The state after some tokens, which may be overwritten."""
    return map_state(made(*given, use_state=True)[1], lambda t: t.clone(memory_format=torch.contiguous_format))


def piece(given, a, b):
    *heads, rope = given
    return *(t[:, a:b] for t in heads), tuple(t[:, a:b] for t in rope)


def kept(state, made):
    """Positions, scores, keys and values of each head's places, in order of positions."""
    fields = [tensors_of(state)[f"kept_{name}"][0] for name in ("positions", "scores", "k", "v")]
    counts = made.config.places
    heads = zip(*(t.split(counts) if isinstance(counts, tuple) else t.unbind(1) for t in fields), strict=True)
    return [tuple(t[positions.argsort()] for t in (positions, *rest)) for positions, *rest in heads]


def check(made, given, begin=1):
    """Steps from ``begin`` on, against the whole text."""
    wanted, after = made(*given, use_state=True)
    state, outputs, length = begun(made, *piece(given, 0, begin)), [], given[0].shape[1]
    for t in range(begin, length):
        o, state = made(*piece(given, t, t + 1), state=state, use_state=True, inplace=True)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), wanted[:, begin:])
    for name, t in tensors_of(after).items():
        if not name.startswith("kept"):
            torch.testing.assert_close(tensors_of(state)[name], t)
    torch.testing.assert_close(kept(state, made), kept(after, made))


@pytest.fixture
def counted(monkeypatch):
    """How many steps were one op's."""
    calls, step = [], hybrid_attention.step_of_one_text

    def count(*given):
        o = step(*given)
        calls.extend([] if o is None else [1])
        return o

    monkeypatch.setattr(hybrid_attention, "step_of_one_text", count)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("begin", [1, 3, 17])
@pytest.mark.parametrize("form", FORMS)
def test_every_step_is_that_of_the_whole_text(form, begin, counted):
    check(made_of(form), inputs(LENGTH, batch=1), begin)
    assert len(counted) == LENGTH - begin


@settings(max_examples=25, deadline=None)
@given(
    window=some.integers(3, 9), anchors=some.integers(0, 6), stride=some.integers(1, 9), seed=some.integers(0, 99),
    places=some.integers(1, 6) | some.tuples(some.integers(1, 6), some.integers(0, 6)),
)  # fmt: skip
@torch.no_grad()
def test_any_sizes(window, anchors, stride, seed, places):
    made = made_of("", window, anchors=anchors, score_stride=stride, kept_keys=places)
    check(made, inputs(3 * window + 12, batch=1, seed=seed))


@torch.no_grad()
def test_equal_scores_stay_where_they_are(counted):
    """The earlier of equal keys is kept, in steps as in a text."""
    made, given = made_of("recommended"), inputs(LENGTH, batch=1)
    x, q, k, v, rope = given
    for parameter in made.key_score.parameters():
        parameter.zero_()  # every score is 0
    made.key_score.received.deviation.fill_(1.0)
    check(made, given)
    assert len(counted) == LENGTH - 1


@torch.no_grad()
def test_places_in_another_order_go_the_other_way(counted):
    made, given = made_of("recommended"), inputs(LENGTH, batch=1)
    wanted = made(*piece(given, 0, 10))[0][:, -1:]
    state = begun(made, *piece(given, 0, 9))
    for name in ("k", "v", "scores", "positions"):
        field = tensors_of(state)[f"kept_{name}"]
        field.copy_(field.flip(1))
    o, _ = made(*piece(given, 9, 10), state=state, use_state=True, inplace=True)
    torch.testing.assert_close(o, wanted)
    assert not counted


@torch.no_grad()
def test_what_the_op_refuses():
    made, given = made_of("recommended"), inputs(12, batch=1)
    state, step = begun(made, *piece(given, 0, 9)), text_step_of(made)
    wrong = state._replace(attention=state.attention._replace(ring_k=state.attention.ring_k[:, 1:].contiguous()))
    with pytest.raises(ValueError, match="ring_k"):
        step.text(wrong)
    with pytest.raises(ValueError, match="state.ring"):
        step.text(state._replace(score=state.score._replace(ring=state.score.ring.float())))
    assert step.text(state.attention) is None
