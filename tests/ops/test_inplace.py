"""The decode step in place: the numbers of the step on copies, in the memory the state had."""

import pytest
import torch

from lizard_ops import AttentionState, chunk_hybrid_attn, recurrent_hybrid_attn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, HQ, HK, D, FP, WINDOW = 3, 4, 2, 8, 4, 5
RECOMMENDED = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "anchors": 2}


def make(length: int, gate: str | None, options: dict, seed: int = 0) -> tuple:
    draw = torch.Generator().manual_seed(seed)
    heads = {"q": (HQ, D), "k": (HK, D), "v": (HK, D), "fq": (HQ, FP), "fk": (HK, FP)}
    x = [torch.randn(N, length, *shape, generator=draw).to(DEVICE) for shape in heads.values()]
    if options["feature_map"] == "identity":
        x[3:] = [t.abs() for t in x[3:]]
    features = FP if options["feature_map"] == "identity" else 2 * FP
    tail = {None: None, "scalar": (1,), "key": (HK,), "query": (HQ,), "channel": (HK, features)}[gate]
    g = None if tail is None else -torch.rand(N, length, *tail, generator=draw).to(DEVICE)
    return (*x, g, WINDOW)


def prefilled(gate: str | None, options: dict, length: int = 4) -> AttentionState:
    state = chunk_hybrid_attn(*make(length, gate, options), **options, output_final_state=True)[1]
    return AttentionState._make(None if x is None else x.contiguous() for x in state)


@torch.no_grad()
@pytest.mark.parametrize(
    "gate, options",
    [
        ("key", RECOMMENDED),
        ("query", {"coverage": "outside", "feature_map": "exp", "anchors": 1}),
        ("channel", {"coverage": "outside", "feature_map": "softmax"}),
        ("channel", {"coverage": "all", "feature_map": "exp", "anchors": 1, "mix": "merge"}),
        (None, {"feature_map": "identity"}),
    ],
)
def test_steps_equal_those_on_copies_and_keep_the_addresses(gate, options):
    state = prefilled(gate, options)
    copies, addresses = state, [None if x is None else x.data_ptr() for x in state]
    for t in range(9):
        tokens = make(1, gate, options, seed=t + 1)
        o, state = recurrent_hybrid_attn(*tokens, **options, initial_state=state, output_final_state=True, inplace=True)
        wanted, copies = recurrent_hybrid_attn(
            *tokens, **options, initial_state=prefilled(gate, options) if t == 0 else copies, output_final_state=True
        )
        torch.testing.assert_close(o, wanted)
    for now, then, wanted in zip(state, addresses, copies, strict=True):
        if now is not None:
            assert now.data_ptr() == then
            torch.testing.assert_close(now, wanted)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3])
def test_padded_rows_and_several_tokens_overwrite_the_state_too(length):
    mask = torch.tensor([[True] * length, [False] * length, [False] * (length - 1) + [True]]).to(DEVICE)
    state, plain = prefilled("key", RECOMMENDED), prefilled("key", RECOMMENDED)
    tokens = make(length, "key", RECOMMENDED, seed=1)
    options = RECOMMENDED | {"padding_mask": mask, "output_final_state": True}
    before = state.position.clone()
    o, after = recurrent_hybrid_attn(*tokens, **options, initial_state=state, inplace=True)
    wanted, copies = recurrent_hybrid_attn(*tokens, **options, initial_state=plain)
    torch.testing.assert_close(o, wanted)
    assert torch.equal(state.position, before + mask.sum(1))
    for now, given, copy in zip(after, state, copies, strict=True):
        assert now is given
        torch.testing.assert_close(now, copy)


def test_what_it_cannot_do_is_refused():
    state, tokens = prefilled("key", RECOMMENDED), make(1, "key", RECOMMENDED)
    with pytest.raises(ValueError, match="inplace: .* without an initial_state"):
        recurrent_hybrid_attn(*tokens, **RECOMMENDED, inplace=True)
    with pytest.raises(ValueError, match="inplace: .* gradients"):
        recurrent_hybrid_attn(tokens[0].requires_grad_(), *tokens[1:], **RECOMMENDED, initial_state=state, inplace=True)
    with torch.no_grad():
        with pytest.raises(ValueError, match="inplace: .*naive"):
            recurrent_hybrid_attn(*tokens, **RECOMMENDED, initial_state=state, inplace=True, impl="naive")
        strided = state._replace(ring_k=state.ring_k.transpose(1, 2).contiguous().transpose(1, 2))
        with pytest.raises(ValueError, match="initial_state.ring_k"):
            recurrent_hybrid_attn(*tokens, **RECOMMENDED, initial_state=strided, inplace=True)
