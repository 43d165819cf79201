"""Feature maps, gates, meta memory, mixes and their parameters, one by one."""

import math

import pytest
import torch

from lizard_layers import (
    AttentionConfig,
    FeatureMaps,
    HedgehogFeatureMap,
    HybridAttention,
    MergeMix,
    MetaMemory,
    SumMix,
    build_gate,
    empty_state,
    select_sequences,
    state_bytes,
)

SHAPE = dict(hidden_size=24, num_heads=4, num_key_heads=2, head_dim=8)
GATES = ["scalar", "key_head", "channel", "mamba2", "pooling"]


def config(**choices) -> AttentionConfig:
    return AttentionConfig(**SHAPE, **choices)


def disturb(module: torch.nn.Module) -> None:
    """Moves every parameter off its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)


# Feature maps


def test_a_map_starts_from_the_identity():
    x = torch.randn(2, 3, 4, 8)
    assert torch.equal(HedgehogFeatureMap(4, 8, 8)(x)[1], x)
    assert torch.equal(HedgehogFeatureMap(4, 8, 5)(x)[1], x[..., :5])


def test_columns_beyond_the_head_dim_start_as_rotations():
    x, made = torch.randn(2, 3, 4, 8), HedgehogFeatureMap(4, 8, 19)
    wide = made(x)[1]
    assert torch.equal(wide[..., :8], x)
    torch.testing.assert_close(wide[..., 8:16].norm(dim=-1), x.norm(dim=-1))
    columns = made.weight.transpose(1, 2).flatten(0, 1)
    assert len(torch.unique(columns.round(decimals=4), dim=0)) == 8 + 4 * 11  # no two alike but the identity's


@pytest.mark.parametrize("maps", [1, 2, 4])
def test_heads_use_the_map_of_their_group(maps):
    made = HedgehogFeatureMap(maps, 8, 6)
    disturb(made)
    x = torch.randn(2, 3, 4, 8)
    for head in range(4):
        torch.testing.assert_close(made(x)[1][:, :, head], x[:, :, head] @ made.weight[head * maps // 4])


def test_a_map_refuses_heads_it_cannot_share():
    with pytest.raises(ValueError, match="a multiple of 3"):
        HedgehogFeatureMap(3, 8, 8)(torch.randn(1, 1, 4, 8))


@pytest.mark.parametrize(
    ("choices", "query_maps", "key_maps"),
    [
        (dict(), 4, 2),
        (dict(key_map="query_head"), 4, 4),
        (dict(feature_projection="shared"), 1, 1),
        (dict(tie_features=True), None, 2),
        (dict(feature_projection="none"), None, None),
    ],
)
def test_maps_a_layer_has(choices, query_maps, key_maps):
    maps = FeatureMaps(config(**choices))
    counts = [None if m is None else m.weight.shape[0] for m in (maps.query_map, maps.key_map)]
    assert counts == [query_maps, key_maps]


def test_tied_maps_are_one():
    maps = FeatureMaps(config(tie_features=True))
    disturb(maps)
    x = torch.randn(2, 3, 2, 8)
    queries = x.repeat_interleave(2, 2)
    _, _, fq, fk = maps(queries, x)
    assert maps.query_map is None  # each beside products of its own shape, whose bits another batch size may change
    assert torch.equal(fq, maps.key_map(queries)[1]) and torch.equal(fk, maps.key_map(x)[1])


def test_one_sided_softmax_is_finished_here():
    maps = FeatureMaps(config(feature_activation="one_sided_softmax"))
    _, _, fq, fk = maps(torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8))
    assert maps.op_feature_map == "identity"
    torch.testing.assert_close(fq.sum(-1), torch.ones(2, 3, 4))
    torch.testing.assert_close(fk.sum(-1), torch.ones(2, 3, 2))


# Gates


@pytest.mark.parametrize("gate_init", [0.993, 0.9, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 16.0])
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_starts_where_it_is_told(gate, temperature, gate_init):
    made = build_gate(config(gate=gate, gate_init=gate_init, gate_temperature=temperature))
    g = made(torch.randn(2, 5, 24), torch.zeros(2, 5, 2, 8))
    torch.testing.assert_close(g.exp(), torch.full_like(g, gate_init), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gate", [g for g in GATES if g != "mamba2"])
def test_no_start_is_a_zero_bias(gate):
    g = build_gate(config(gate=gate, gate_init=None))(torch.zeros(2, 5, 24), torch.zeros(2, 5, 2, 8))
    torch.testing.assert_close(g.exp(), torch.full_like(g, 0.5))


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_float32_decays_of_the_promised_width(gate):
    made = build_gate(config(gate=gate))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn_like(parameter)
    g = made((100 * torch.randn(2, 5, 24)).bfloat16(), 100 * torch.randn(2, 5, 2, 8).bfloat16())
    width = {"scalar": (1,), "channel": (2, 16)}.get(gate, (2,))
    assert g.shape == (2, 5, *width) and g.dtype == torch.float32
    assert (g <= 0).all() and g.isfinite().all()


def test_pooling_averages_the_channels_of_each_head():
    made, k = build_gate(config(gate="pooling")), torch.randn(2, 5, 2, 8)
    g = made(torch.zeros(2, 5, 24), k)
    torch.testing.assert_close(made(torch.zeros(2, 5, 24), k[..., torch.randperm(8)]), g)
    for channel in range(8):
        other = k.clone()
        other[:, :, 1, channel] += 1.0
        changed = made(torch.zeros(2, 5, 24), other)
        assert (changed[:, :, 1] != g[:, :, 1]).all() and torch.equal(changed[:, :, 0], g[:, :, 0])


def test_no_gate():
    assert build_gate(config(gate="none")) is None


# Meta memory


def test_sinks_start_apart_and_learn_apart():
    memory = MetaMemory(4, init=-1.0, spread=0.5)
    torch.testing.assert_close(memory().detach(), torch.tensor([-1.75, -1.25, -0.75, -0.25]))
    memory().exp().sum().backward()
    assert memory.logits.grad.unique().numel() == 4


def test_sinks_a_head():
    assert MetaMemory(3, num_heads=4)().shape == (4, 3)


# Mixes


def test_alpha_is_fixed_learned_or_a_head():
    x = torch.randn(2, 5, 24)
    assert SumMix(config(mix="sum", alpha_init=0.5))(x) == {"alpha": 0.5}
    assert SumMix(config(mix="sum", alpha="learned", alpha_init=0.5))(x)["alpha"].shape == ()
    assert SumMix(config(mix="sum", alpha="per_head", alpha_init=0.5))(x)["alpha"].tolist() == [0.5] * 4


def test_merge_bias_of_head_and_token():
    x = torch.randn(2, 5, 24)
    assert MergeMix(config())(x) == {"merge_bias": None}
    assert MergeMix(config(merge_bias="head", merge_bias_init=2.0))(x)["merge_bias"].tolist() == [2.0] * 4
    both = MergeMix(config(merge_bias="head_and_token", merge_bias_init=2.0))
    torch.testing.assert_close(both(x)["merge_bias"], torch.full((2, 5, 4), 2.0))
    with torch.no_grad():
        both.weight.normal_()
    torch.testing.assert_close(both(x)["merge_bias"], 2.0 + x @ both.weight.T)


# Parameters


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
def test_parameters_stay_float32_in_a_half_precision_model(cast):
    inner = HybridAttention(config(num_sinks=2, merge_bias="head_and_token", gate="channel"))
    before = {name: p.clone() for name, p in inner.named_parameters()}
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), inner)
    getattr(model, cast)(*([torch.bfloat16] if cast == "to" else []))
    assert model[0].weight.dtype != torch.float32
    for name, parameter in inner.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name]), name


def test_parameters_are_float32_under_a_half_precision_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = HybridAttention(config(num_sinks=2, merge_bias="head_and_token", gate="mamba2"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 for p in made.parameters())


def test_parameters_follow_double_and_meta():
    made = HybridAttention(config())
    assert all(p.dtype == torch.float64 for p in made.double().parameters())
    assert all(p.device.type == "meta" for p in made.to("meta").parameters())


# State


def test_state_bytes_by_hand():
    made = config(window=16, anchors=4, gate="key_head")
    kv, ring_features, gates = 2 * (16 + 4) * 2 * 8 * 2, 16 * 2 * 8 * 2, 16 * 2 * 4
    sums = 2 * 16 * (8 + 1) * 4
    empty = empty_state(made, 1, torch.bfloat16, device="meta")
    assert state_bytes(empty) == 8 + kv + ring_features + gates + sums
    assert {t.device.type for t in empty if t is not None} == {"meta"}


def test_select_sequences_reorders_and_repeats():
    state = empty_state(config(feature_activation="exp"), 3)
    state = state._replace(position=torch.tensor([5, 6, 7]))
    chosen = select_sequences(state, torch.tensor([2, 0, 0]))
    assert chosen.position.tolist() == [7, 5, 5]
    assert chosen.s.shape == state.s.shape and math.isinf(chosen.log_scale[0, 0])


def test_new_parameters_go_where_they_are_sent_and_stay_float32():
    """To another device and to half precision in one call."""
    moved = build_gate(config()).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in moved.parameters()} == {("meta", torch.float32)}
