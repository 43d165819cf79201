"""Feature maps started blind to the biases of the heads that they read."""

import pytest
import torch

from lizard_layers import AttentionConfig, FeatureMaps

HEADS, KEY_HEADS, DIM = 4, 2, 16
CHOICES = [
    {},
    dict(feature_dim=8),
    dict(feature_dim=40),
    dict(key_map="query_head"),
    dict(feature_projection="shared"),
    dict(tie_features=True),
    dict(tie_features=True, key_map="query_head"),
    dict(tie_features=True, feature_projection="shared"),
]


def maps_of(**choices) -> tuple[FeatureMaps, int]:
    config = AttentionConfig(hidden_size=24, num_heads=HEADS, num_key_heads=KEY_HEADS, head_dim=DIM, **choices)
    return FeatureMaps(config), config.linear_key_heads // KEY_HEADS


@torch.no_grad()
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_biases_move_no_activation(choices):
    torch.manual_seed(0)
    maps, repeats = maps_of(**choices)
    q, k = torch.randn(2, 5, HEADS, DIM), torch.randn(2, 5, KEY_HEADS, DIM)
    q_bias, k_bias = 300 * torch.randn(HEADS, DIM), 300 * torch.randn(KEY_HEADS, DIM)
    k, of_k = k.repeat_interleave(repeats, 2), k_bias.repeat_interleave(repeats, 0)
    before = maps(q, k)[2:]
    maps.start_blind_to(q_bias, k_bias)
    for with_bias, without, plain in zip(maps(q + q_bias, k + of_k)[2:], maps(q, k)[2:], before, strict=True):
        assert (with_bias - without).abs().max() < 1e-3
        assert without.norm() > 0.6 * plain.norm()  # the rest of x is read still


@pytest.mark.parametrize(
    "k_bias", [None, torch.zeros(KEY_HEADS, DIM), torch.full((KEY_HEADS, DIM), torch.nan)], ids=["none", "zero", "nan"]
)
def test_only_maps_of_heads_with_a_bias_are_changed(k_bias):
    maps, _ = maps_of()
    bits = {name: t.clone() for name, t in maps.state_dict().items()}
    maps.start_blind_to(None, k_bias)
    assert all(torch.equal(t, bits[name]) for name, t in maps.state_dict().items())
    one = torch.zeros(HEADS, DIM)
    one[2, 5] = 3.0
    maps.start_blind_to(one, k_bias)
    moved = [not torch.equal(a, b) for a, b in zip(maps.query_map.weight, bits["query_map.weight"], strict=True)]
    assert moved == [False, False, True, False] and torch.equal(maps.key_map.weight, bits["key_map.weight"])
    assert not maps.query_map.weight[2, 5].any()


def test_a_shared_map_of_more_directions_than_half_starts_as_ever():
    heads = dict(hidden_size=24, num_heads=9, num_key_heads=9, head_dim=DIM)
    maps = FeatureMaps(AttentionConfig(**heads, feature_projection="shared"))
    maps.start_blind_to(torch.randn(9, DIM), torch.arange(1.0, 10)[:, None] * torch.randn(DIM))  # nine, and one
    assert torch.equal(maps.query_map.weight[0], torch.eye(DIM))
    assert not torch.equal(maps.key_map.weight[0], torch.eye(DIM))


def test_maps_without_a_projection_are_left():
    maps, _ = maps_of(feature_projection="none")
    maps.start_blind_to(torch.ones(HEADS, DIM), torch.ones(KEY_HEADS, DIM))
    assert not maps.state_dict()
