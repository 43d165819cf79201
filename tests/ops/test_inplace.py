"""The decode step in place: the numbers of the reference on the whole text, in the memory the state had."""

import pytest
import torch

from lizard_ops import AttentionState, chunk_hybrid_attn, naive_hybrid_attn, recurrent_hybrid_attn

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


def reference(gate: str | None, options: dict, *pieces: tuple, row: int | None = None) -> tuple:
    """(o of the last piece, state) of the naive op on prompt and tokens as one text; row: of that row alone."""
    rows = slice(None) if row is None else slice(row, row + 1)
    *texts, window = (
        None if x[0] is None else torch.cat([t[rows] for t in x], 1) if torch.is_tensor(x[0]) else x[0]
        for x in zip(make(4, gate, options), *pieces, strict=True)
    )
    o, state = naive_hybrid_attn(*texts, window, **options, output_final_state=True)
    return o[:, o.shape[1] - pieces[-1][0].shape[1] :], state


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
    copies, addresses = prefilled(gate, options), [None if x is None else x.data_ptr() for x in state]
    pieces = []
    for t in range(9):
        pieces.append(make(1, gate, options, seed=t + 1))
        o, state = recurrent_hybrid_attn(
            *pieces[-1], **options, initial_state=state, output_final_state=True, inplace=True
        )
        on_copies, copies = recurrent_hybrid_attn(*pieces[-1], **options, initial_state=copies, output_final_state=True)
        wanted, after = reference(gate, options, *pieces)
        for found in (o, on_copies):
            torch.testing.assert_close(found, wanted)
    for now, copy, then, wanted in zip(state, copies, addresses, after, strict=True):
        if wanted is None:
            assert now is copy is None
            continue
        assert now.data_ptr() == then != copy.data_ptr()
        for found in (now, copy):
            torch.testing.assert_close(found, wanted)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3])
def test_padded_rows_and_several_tokens_overwrite_the_state_too(length):
    mask = torch.tensor([[True] * length, [False] * length, [False] * (length - 1) + [True]]).to(DEVICE)
    state = prefilled("key", RECOMMENDED)
    tokens = make(length, "key", RECOMMENDED, seed=1)
    options = RECOMMENDED | {"padding_mask": mask, "output_final_state": True}
    before = state.position.clone()
    o, after = recurrent_hybrid_attn(*tokens, **options, initial_state=state, inplace=True)
    assert torch.equal(state.position, before + mask.sum(1))
    for row, real in enumerate(mask):
        kept = tuple(x[:, real] if torch.is_tensor(x) else x for x in tokens)
        wanted, alone = reference("key", RECOMMENDED, kept, row=row)
        torch.testing.assert_close(o[row : row + 1, real], wanted)
        assert not o[row, ~real].any()
        for now, given, field in zip(after, state, alone, strict=True):
            assert now is given
            if field is not None:
                torch.testing.assert_close(now[row : row + 1], field)


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
