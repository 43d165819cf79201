"""Heads split over ranks: together the outputs and the states of the whole layer."""

import pytest
import torch

from lizard_layers import (
    AttentionConfig,
    HybridAttention,
    config_of_rank,
    part_of_rank,
    sizes_of_rank,
    tensors_of,
)

SHAPE = dict(hidden_size=12, num_heads=8, num_key_heads=4, head_dim=6, window=5, anchors=2)
CASES = {
    "recommended": dict(merge_bias="head_and_token", num_sinks=2, sinks_per_head=True),
    "channel gate, features of query heads": dict(gate="channel", key_map="query_head", feature_dim=4),
    "one gate, shared maps": dict(gate="scalar", feature_projection="shared", mix="sum", alpha="per_head"),
    "mamba2": dict(gate="mamba2", coverage="all"),
    "places per head, received": dict(kept_keys=(3, 0, 1, 2), score_dim=4, score_received=True, score_stride=2),
}
HEADS = ("s", "z", "log_scale", "ring_k", "ring_v", "ring_fk", "anchor_k", "anchor_v", "score.linear", "score.key_sum")


def whole_layer(choices):
    layer = HybridAttention(AttentionConfig(**SHAPE | choices)).double().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("case, size", [(case, 2 if "places" in case else 4) for case in CASES])
def test_ranks_together_are_the_whole_layer(case, size):
    layer = whole_layer(CASES[case])
    draw = torch.Generator().manual_seed(1)
    shapes = ((12,), (8, 6), (4, 6), (4, 6))
    inputs = [torch.randn(2, 13, *shape, generator=draw, dtype=torch.float64) for shape in shapes]
    turns = torch.randn(2, 1, 13, 6, generator=draw, dtype=torch.float64)
    turns = (turns[0].cos(), turns[0].sin())
    o, state = layer(*inputs, turns, use_state=True)
    outputs, states = [], []
    for rank in range(size):
        own = HybridAttention(config_of_rank(layer.config, rank, size)).double().requires_grad_(False)
        sizes = sizes_of_rank(layer.config, rank, size)
        parts = {name: part_of_rank(p, sizes[name], rank) for name, p in layer.named_parameters()}
        own.load_state_dict(parts)
        heads = [x.chunk(size, 2)[rank] for x in inputs[1:]]
        found, after = own(inputs[0], *heads, turns, use_state=True)
        outputs.append(found)
        states.append(tensors_of(after))
    torch.testing.assert_close(torch.cat(outputs, 2), o, rtol=1e-12, atol=1e-12)
    for name, wanted in tensors_of(state).items():
        if name in HEADS:
            axis = 1 if name in ("s", "z", "log_scale", "score.key_sum") else 2
            parts = torch.cat([part[name] for part in states], axis)
            torch.testing.assert_close(parts, wanted, rtol=1e-12, atol=1e-12, msg=name)


def test_heads_that_do_not_divide_are_refused():
    config = AttentionConfig(**SHAPE)
    with pytest.raises(ValueError, match="num_key_heads=4: heads are split over 3 ranks"):
        config_of_rank(config, 0, 3)
    kept = AttentionConfig(**SHAPE, kept_keys=(3, 0, 1, 2), score_dim=4)
    assert config_of_rank(kept, 1, 2).kept_keys == (1, 2)
    with pytest.raises(ValueError, match=r"kept_keys=\(3, 0, 1, 2\): of 4 ranks, rank 1"):
        config_of_rank(kept, 1, 4)
