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


def test_what_has_no_bias_or_too_many_keeps_its_bits():
    bits = {name: t.clone() for name, t in maps_of()[0].state_dict().items()}
    for q_bias, k_bias in ((None, None), (torch.zeros(HEADS, DIM), None), (None, torch.full((KEY_HEADS, DIM), torch.nan))):
        maps, _ = maps_of()
        maps.start_blind_to(q_bias, k_bias)
        assert all(torch.equal(t, bits[name]) for name, t in maps.state_dict().items())
    maps, _ = maps_of()
    maps.start_blind_to(torch.eye(HEADS, DIM) * torch.tensor([1.0, 0, 0, 0])[:, None], None)
    moved = [not torch.equal(a, b) for a, b in zip(maps.query_map.weight, bits["query_map.weight"], strict=True)]
    assert moved == [True, False, False, False] and torch.equal(maps.key_map.weight, bits["key_map.weight"])

    wide = AttentionConfig(hidden_size=24, num_heads=12, num_key_heads=12, head_dim=DIM, feature_projection="shared")
    maps = FeatureMaps(wide)
    maps.start_blind_to(torch.randn(12, DIM), torch.ones(12, 1) * torch.randn(DIM))  # 12 directions of 16, and one
    assert torch.equal(maps.query_map.weight[0], torch.eye(DIM)) and not torch.equal(maps.key_map.weight[0], torch.eye(DIM))


def test_maps_without_a_projection_are_left():
    maps, _ = maps_of(feature_projection="none")
    maps.start_blind_to(torch.ones(HEADS, DIM), torch.ones(KEY_HEADS, DIM))
    assert not maps.state_dict()
