"""Shapes are checked once for each kind of call, values in every one."""

import pytest
import torch

from lizard_ops import chunk_hybrid_attn, recurrent_hybrid_attn
from lizard_ops.common.state import AttentionState
from lizard_ops.hybrid_attn import accepted

OPTIONS = dict(anchors=2, mix="merge", coverage="outside", feature_map="softmax", output_final_state=True)


@pytest.fixture
def full(monkeypatch):
    """The calls that are checked in full."""
    calls, check = [], accepted.hybrid_arguments
    monkeypatch.setattr(accepted, "_accepted", set())
    monkeypatch.setattr(accepted, "hybrid_arguments", lambda *args: calls.append(args) or check(*args))
    return calls


def inputs(length, seed=0, rows=2):
    draw = torch.Generator().manual_seed(seed)
    q, k, v, fq, fk = (torch.randn(rows, length, h, 4, generator=draw) for h in (4, 2, 2, 4, 2))
    return q, k, v, fq, fk, -torch.rand(rows, length, 2, generator=draw)


def test_a_kind_of_call_is_checked_in_full_once(full):
    for seed in range(3):
        o, state = chunk_hybrid_attn(*inputs(9, seed), 3, **OPTIONS)
        for _ in range(2):
            _, state = recurrent_hybrid_attn(*inputs(1, seed), 3, initial_state=state, **OPTIONS)
    assert len(full) == 2
    accepted._accepted.clear()
    again, _ = chunk_hybrid_attn(*inputs(9, 2), 3, **OPTIONS)
    assert torch.equal(o, again)
    chunk_hybrid_attn(*inputs(10), 3, **OPTIONS)
    chunk_hybrid_attn(*inputs(10), 3, **OPTIONS | {"anchors": 1})
    mask = torch.ones(2, 10, dtype=torch.bool)
    for _ in range(2):
        chunk_hybrid_attn(*inputs(10), 3, **OPTIONS, padding_mask=mask)
    assert len(full) == 7


@pytest.mark.parametrize("mix", ["sum", "merge"])
def test_spellings_become_one_as_ever(full, mix):
    q, k, v, fq, fk, g = inputs(7)
    weight = {"alpha": torch.tensor(0.3)} if mix == "sum" else {"merge_bias": torch.zeros(4)}
    options = OPTIONS | dict(mix=mix, sinks=torch.tensor([0.2, -1.0]), scale=None, **weight)
    for _ in range(2):
        calls = [chunk_hybrid_attn(q, k, v, fq, fk, g[..., 0], 3, **options)[0] for _ in range(2)]
        assert torch.equal(*calls)
    assert len(full) == 1
    wide = options | {"sinks": options["sinks"].expand(4, 2), "scale": 0.5}
    wide |= {"alpha": torch.full((4,), 0.3)} if mix == "sum" else {}
    torch.testing.assert_close(calls[0], chunk_hybrid_attn(q, k, v, fq, fk, g[..., :1], 3, **wide)[0])


def test_what_was_accepted_does_not_pass_in_another_guise(full):
    given = inputs(7)
    for _ in range(2):
        _, state = chunk_hybrid_attn(*given, 1, **OPTIONS)
    rising = given[5].clone()
    rising[1, 3, 0] = 0.5
    with pytest.raises(ValueError, match="g: got 0.5"):
        chunk_hybrid_attn(*given[:5], rising, 1, **OPTIONS)
    with pytest.raises(ValueError, match="window: got True"):
        chunk_hybrid_attn(*given, True, **OPTIONS)
    with pytest.raises(ValueError, match="kept_keys: got"):
        chunk_hybrid_attn(*given, 1, **OPTIONS, kept_keys=[3])
    with pytest.raises(ValueError, match="k: got"):
        chunk_hybrid_attn(given[0], given[1].double(), *given[2:], 1, **OPTIONS)
    step = inputs(1)
    recurrent_hybrid_attn(*step, 1, initial_state=state, **OPTIONS)
    with pytest.raises(ValueError, match="initial_state.position: got -1"):
        recurrent_hybrid_attn(*step, 1, initial_state=state._replace(position=state.position - 8), **OPTIONS)
    with pytest.raises(ValueError, match="initial_state"):
        recurrent_hybrid_attn(*step, 1, initial_state=tuple(state), **OPTIONS)
    with pytest.raises(ValueError, match="initial_state.anchor_k"):
        recurrent_hybrid_attn(*step, 1, initial_state=state._replace(anchor_k=None), **OPTIONS)
    assert isinstance(state, AttentionState)


def test_kinds_do_not_pile_up(full, monkeypatch):
    monkeypatch.setattr(accepted, "MOST", 3)
    for length in range(2, 9):
        chunk_hybrid_attn(*inputs(length), 3, **OPTIONS)
    assert len(full) == 7 and len(accepted._accepted) <= 3


def test_a_coverage_that_is_another_without_kept_keys_stays_it(full):
    outputs = [chunk_hybrid_attn(*inputs(9), 3, **OPTIONS | {"coverage": c}) for c in ("outside", "left", "left")]
    assert len(full) == 2 and all(torch.equal(o, outputs[0][0]) for o, _ in outputs)
    assert all(state._fields == outputs[0][1]._fields for _, state in outputs)
