"""Any sound combination of choices, drawn at random: it says what its formulas say, in one piece or in many."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_checks import SHAPE, as_formulas_read, assert_same_state, disturb_facts, inputs

from lizard_layers import AttentionConfig, HybridAttention

CHOICES = dict(
    window=st.integers(1, 9),
    anchors=st.integers(0, 3),
    kept_keys=st.sampled_from([0, 0, 2, 5, (3, 0), (1, 4)]),
    score_received=st.booleans(),
    score_stride=st.integers(1, 4),
    window_rope=st.booleans(),
    linear_rope=st.booleans(),
    num_sinks=st.integers(0, 2),
    sinks_per_head=st.booleans(),
    linear_branch=st.sampled_from([True, True, True, False]),
    coverage=st.sampled_from(["all", "outside", "left"]),
    normalize=st.booleans(),
    feature_activation=st.sampled_from(["softmax", "exp", "one_sided_softmax"]),
    feature_projection=st.sampled_from(["per_head", "shared"]),
    tie_features=st.booleans(),
    key_map=st.sampled_from(["key_head", "query_head"]),
    feature_dim=st.sampled_from([None, 2, 6]),
    feature_dim_counts=st.sampled_from(["projection", "features"]),
    gate=st.sampled_from(["none", "scalar", "key_head", "channel", "mamba2", "pooling"]),
    gate_init=st.sampled_from([None, 0.9, 0.993]),
    gate_temperature=st.sampled_from([1.0, 16.0]),
    mix=st.sampled_from(["sum", "merge"]),
)


@settings(max_examples=90, deadline=None, derandomize=True)
@given(choices=st.fixed_dictionaries(CHOICES), length=st.integers(1, 14), data=st.data())
def test_any_sound_choices(choices, length, data):
    if choices["mix"] == "merge":
        choices["merge_bias"] = data.draw(st.sampled_from(["none", "head", "head_and_token"]))
    else:
        choices["alpha"] = data.draw(st.sampled_from(["fixed", "learned", "per_head"]))
    try:
        config = AttentionConfig(**SHAPE, **choices)
    except ValueError:
        assume(False)
    torch.manual_seed(0)
    made = HybridAttention(config).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        if made.key_score is not None and config.score_received:
            disturb_facts(made)
        x, q, k, v, rope = inputs(length, batch=1)
        whole, end = made(x, q, k, v, rope, use_state=True)
        torch.testing.assert_close(whole, as_formulas_read(made, x, q, k, v, rope), rtol=1e-8, atol=1e-8)
        cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
        state, pieces = None, []
        for a, b in zip([0, *cuts], [*cuts, length], strict=True):
            piece = (x[:, a:b], q[:, a:b], k[:, a:b], v[:, a:b], tuple(t[:, a:b] for t in rope))
            o, state = made(*piece, state, use_state=True)
            pieces.append(o)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-8, atol=1e-8)
        assert_same_state(state, end, rtol=1e-8, atol=1e-8)
