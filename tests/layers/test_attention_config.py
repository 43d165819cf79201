"""Choices that cannot stand together are refused with the reason; the rest have the shapes they promise."""

import dataclasses

import pytest

from lizard_layers import AttentionChoices, AttentionConfig

SHAPE = dict(hidden_size=24, num_heads=4, num_key_heads=2, head_dim=8)

CLAMPED = dict(window=9, anchors=3, positions="clamped")

REFUSED = {
    "window must be at least 1": dict(window=0),
    "anchors must not be negative": dict(anchors=-1),
    "kept_keys must not be negative": dict(kept_keys=-1),
    "kept_keys must not be negative or empty, got .3, -1.": dict(kept_keys=[3, -1]),
    "kept_keys must not be negative or empty, got ..": dict(kept_keys=()),
    "kept_keys of a layer must be a number or one for each of its 2 key heads, got .3, 1, 2.": dict(
        kept_keys=(3, 1, 2)
    ),
    "kept_keys of a layer must be a number or one .* got ..3, 1.": dict(kept_keys=[[3, 1], [2, 2]]),
    "kept_keys must be int .* got .3, 1.5.": dict(kept_keys=(3, 1.5)),
    "kept_keys=.0, 3. leaves the other keys to the linear branch": dict(kept_keys=(0, 3), linear_branch=False),
    "score_dim must be at least 1": dict(score_dim=0),
    "score_stride must be at least 1": dict(score_stride=0),
    "kept_keys=3 leaves the other keys to the linear branch": dict(kept_keys=3, linear_branch=False),
    'kept_keys=3 needs gate_form="stable"': dict(kept_keys=3, gate_form="absorbed", feature_activation="exp"),
    "kept_keys=3 needs a window of at least 3, got 2": dict(kept_keys=3, window=2),
    "gate_init is a decay between 0 and 1": dict(gate_init=1.0),
    "gate_temperature must be positive": dict(gate_temperature=0.0),
    "feature_dim must be at least 1": dict(feature_dim=0),
    "act as one": dict(num_sinks=4, sink_spread=0.0),
    "counts both signs and must be even": dict(feature_dim=7, feature_dim_counts="features"),
    "feature_dim needs a learned projection": dict(feature_projection="none", feature_dim=8),
    "needs normalize=True": dict(normalize=False),
    "position_limit=10 is less than window .* = 12": CLAMPED | dict(position_limit=10),
    "position_step=0 must be at least 1": CLAMPED | dict(position_step=0),
    "position_step=301 must be .* at most position_limit=300": CLAMPED | dict(position_limit=300, position_step=301),
    'position_step belongs to positions="clamped"': dict(position_step=3),
    "lets reach zero": dict(num_sinks=4, sink_form="linear"),
    'alpha belongs to mix="sum"': dict(alpha="learned"),
    'merge_bias belongs to mix="merge"': dict(mix="sum", merge_bias="head"),
    'merge_bias_init=1.0 starts a bias, but merge_bias="none"': dict(merge_bias_init=1.0),
    "a softmax divides it out again": dict(gate_form="absorbed"),
    "has one per feature": dict(gate_form="absorbed", feature_activation="exp", gate="channel"),
    "mix must be Literal": dict(mix="product"),
    "window must be int, got 2.5": dict(window=2.5),
    "window must be int, got True": dict(window=True),
    "anchors must be int, got '4'": dict(anchors="4"),
    "normalize must be bool, got 1": dict(normalize=1),
    "must divide num_heads=4": dict(num_key_heads=3),
    "head_dim must be even": dict(head_dim=7),
    "hidden_size must be at least 1": dict(hidden_size=0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_unsound_choices_are_refused(reason):
    with pytest.raises(ValueError, match=reason):
        AttentionConfig(**SHAPE | REFUSED[reason])


def test_the_limit_of_positions_may_be_as_short_as_window_and_anchors():
    config = AttentionConfig(**SHAPE, **CLAMPED, position_limit=12, position_step=12)
    assert (config.position_limit, config.position_step) == (12, 12)


def test_what_is_chosen_where_nothing_is_said():
    """A default that changes would change every saved configuration that does not name it."""
    assert dataclasses.asdict(AttentionChoices()) == dict(
        window=128, anchors=0, kept_keys=0, score_dim=128, score_received=False, score_stride=8, window_rope=True,
            positions="true", kept_past="moved", position_limit=None, position_step=None,
        linear_rope=False, num_sinks=0, sinks_per_head=False, sink_form="exp", sink_init=0.0, sink_spread=1.0,
        linear_branch=True, coverage="outside", normalize=True, feature_activation="softmax",
        feature_projection="per_head", tie_features=False, key_map="key_head", feature_dim=None,
        feature_dim_counts="projection", feature_scale=None, gate="key_head", gate_init=0.993, gate_rank=16,
        gate_temperature=1.0, gate_form="stable", mix="merge", alpha="fixed", alpha_init=1.0, merge_bias="none",
        merge_bias_init=0.0, impl="auto",
    )  # fmt: skip


def test_window_only_does_not_ask_about_the_linear_branch():
    config = AttentionConfig(**SHAPE, linear_branch=False, normalize=False)
    assert not config.linear_branch and not config.normalize
    with pytest.raises(ValueError, match="normalize"):
        AttentionConfig(**SHAPE, normalize=False)


def test_every_choice_is_explained():
    import ast
    import inspect

    body = ast.parse(inspect.getsource(AttentionChoices)).body[0].body
    explained = {
        field.target.id
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    assert explained == {f.name for f in dataclasses.fields(AttentionChoices)}


@pytest.mark.parametrize(
    ("choices", "projection", "features", "key_heads"),
    [
        (dict(), 8, 16, 2),
        (dict(feature_dim=128), 128, 256, 2),
        (dict(feature_dim=128, feature_dim_counts="features"), 64, 128, 2),
        (dict(feature_activation="one_sided_softmax", feature_dim=6, feature_dim_counts="features"), 6, 6, 2),
        (dict(key_map="query_head"), 8, 16, 4),
    ],
)
def test_derived_sizes(choices, projection, features, key_heads):
    config = AttentionConfig(**SHAPE, **choices)
    assert (config.projection_dim, config.num_features) == (projection, features)
    assert config.linear_key_heads == key_heads


@pytest.mark.parametrize(
    ("given", "kept", "places"),
    [([3, 1], (3, 1), (3, 1)), ((2, 2), 2, 2), ([0, 0], 0, 0), ([0, 5], (0, 5), (0, 5))],
)
def test_as_many_kept_keys_for_each_key_head_are_one_number(given, kept, places):
    config = AttentionConfig(**SHAPE, kept_keys=given)
    assert (config.kept_keys, config.places) == (kept, places) and config.keeps_keys == bool(kept)
    config = AttentionConfig(**SHAPE, kept_keys=given, key_map="query_head")
    assert config.places == (places if isinstance(places, int) else tuple(n for n in places for _ in range(2)))


@pytest.mark.parametrize(
    ("choices", "wanted"),
    [
        (dict(positions="clamped"), 'needs coverage="left" or "all"'),
        (dict(coverage="left"), 'needs positions="clamped", got "true"'),
    ],
)
def test_keys_are_dropped_past_a_limit_and_where_the_sums_have_them(choices, wanted):
    with pytest.raises(ValueError, match=f'kept_keys=3 with kept_past="dropped" {wanted}'):
        AttentionConfig(**SHAPE, kept_keys=3, kept_past="dropped", **choices)
    AttentionConfig(**SHAPE, kept_past="dropped", **choices)  # without kept keys there is nothing to drop


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_scale_and_softcap_are_positive(name):
    assert getattr(AttentionConfig(**SHAPE), name) is None
    with pytest.raises(ValueError, match=f"{name} must be positive or None, got 0.0"):
        AttentionConfig(**SHAPE, **{name: 0.0})


def test_from_choices_keeps_every_choice():
    choices = AttentionChoices(window=7, anchors=2, gate="channel")
    config = AttentionConfig.from_choices(choices, **SHAPE)
    assert all(getattr(config, f.name) == getattr(choices, f.name) for f in dataclasses.fields(AttentionChoices))
    assert config.num_heads == 4
