"""A token of one text from what a layer projects: the numbers of the ops that it stands for, and what it refuses."""

import pytest
import torch

from lizard_ops import (
    AttentionState,
    TextStep,
    chunk_hybrid_attn,
    recurrent_hybrid_attn,
    text_step,
    token_heads,
    turn_matrix,
)

HQ, HK, D, FP, WINDOW, HIDDEN, LENGTH = 6, 2, 8, 4, 5, 12, 17
FORMS = {
    "all": dict(anchors=2, temperature=2.0, softcap=3.0, scale=0.5, merge_mass="absolute", feature_scale=0.7),
    "default": {},
    "shared": dict(anchors=1),
}


def parts(form, length=LENGTH, dtype=torch.float64):
    """(x, q, k, v), maps, the angles, gate and merge."""
    draw = torch.Generator().manual_seed(0)

    def of(*shape):
        return torch.randn(*shape, generator=draw, dtype=dtype)

    tokens = of(1, length, HIDDEN), of(1, length, HQ, D), of(1, length, HK, D), of(1, length, HK, D)
    maps = (1, 1, 1) if form == "shared" else (HQ, HK, HK)
    angles = of(1, length, D // 2).repeat(1, 1, 2)
    weights = (of(maps[0], D, FP), of(maps[1], D, FP)), (of(maps[2], HIDDEN), of(maps[2]))
    merge = of(HQ, HIDDEN), None if form == "shared" else of(HQ)
    return tokens, (angles.cos(), angles.sin()), *weights, merge


def at(tokens, rope, a, b):
    return tuple(t[:, a:b] for t in tokens), tuple(t[:, a:b] for t in rope)


def hybrid(op, tokens, rope, maps, gate, merge, options, **more):
    """What ``text_step`` says that it computes."""
    options = dict(options)
    x, q, k, v = tokens
    heads = token_heads(x, q, k, maps, rope, gate, merge, temperature=options.pop("temperature", 1.0))
    return op(
        heads.q, heads.k, v, heads.fq, heads.fk, heads.g, WINDOW, merge_bias=heads.merge_bias, mix="merge",
        coverage="outside", feature_map="softmax", output_final_state=True, **options, **more,
    )  # fmt: skip


def first(form):
    """A state after one token, contiguous."""
    tokens, rope, *weights = parts(form)
    _, state = hybrid(chunk_hybrid_attn, *at(tokens, rope, 0, 1), *weights, FORMS[form])
    return AttentionState._make(None if t is None else t.contiguous() for t in state)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_ops_that_it_stands_for(form):
    tokens, rope, *weights = parts(form)
    state, other = first(form), first(form)
    places = [None if t is None else t.data_ptr() for t in state]
    for t in range(1, LENGTH):
        here = at(tokens, rope, t, t + 1)
        wanted, other = hybrid(recurrent_hybrid_attn, *here, *weights, FORMS[form], initial_state=other, impl="naive")
        maps, gate, merge = weights
        torch.testing.assert_close(
            text_step(*here[0], maps, here[1], gate, merge, WINDOW, state, **FORMS[form]), wanted
        )
        for now, true in zip(state, other, strict=True):
            assert (now is None) == (true is None)
            if now is not None:
                torch.testing.assert_close(now, true)
    assert [None if t is None else t.data_ptr() for t in state] == places


@torch.no_grad()
@pytest.mark.parametrize("form", ["default", "shared"])
def test_a_step_made_once_is_that_of_each_call(form):
    """With the defaults of ``text_step``, of maps that are not square."""
    tokens, rope, maps, gate, merge = parts(form)
    made, state, other = TextStep(maps, gate, merge, WINDOW, **FORMS[form]), first(form), first(form)
    for t in range(1, LENGTH):
        (x, q, k, v), turn = at(tokens, rope, t, t + 1)
        wanted = text_step(x, q, k, v, maps, turn, gate, merge, WINDOW, other, **FORMS[form])
        text = made.text(state)
        o = made(text, x.view(-1), torch.cat([q, k], 2)[0, 0], v[0, 0], turn_matrix(turn[0][0, 0], turn[1][0, 0]))
        torch.testing.assert_close(o.reshape(wanted.shape), wanted)
        for now, true in zip(state, other, strict=True):
            assert (now is None) == (true is None)
            if now is not None:
                torch.testing.assert_close(now, true)


@torch.no_grad()
def test_a_state_that_is_set_back_or_moved_is_read_anew():
    tokens, rope, maps, gate, merge = parts("default")
    state = first("default")

    def step(state, t):
        x, turn = at(tokens, rope, t, t + 1)
        return text_step(*x, maps, turn, gate, merge, WINDOW, state)

    before = AttentionState._make(None if t is None else t.clone() for t in state)
    wanted = [step(state, t) for t in range(1, 9)]
    for t, old in zip(state, before, strict=True):
        if t is not None:
            t.copy_(old)
    torch.testing.assert_close([step(state, t) for t in range(1, 9)], wanted, rtol=0, atol=0)
    for t, old in zip(state, before, strict=True):
        if t is not None:
            t.data = old  # elsewhere, under the same name
    torch.testing.assert_close([step(state, t) for t in range(1, 9)], wanted, rtol=0, atol=0)


@torch.no_grad()
def test_what_it_refuses():
    tokens, rope, maps, gate, merge = parts("default")
    state, (x, turn) = first("default"), at(tokens, rope, 1, 2)
    step = lambda x=x, turn=turn, maps=maps, gate=gate, state=state, **options: text_step(  # noqa: E731
        *x, maps, turn, gate, merge, WINDOW, state, **options
    )
    before = [None if t is None else t.clone() for t in state]
    with pytest.raises(ValueError, match="x: .* one token of one text"):
        step(*at(tokens, rope, 1, 3))
    with pytest.raises(ValueError, match="gate: .* one a key head"):
        step(gate=(torch.randn(HQ, HIDDEN, dtype=torch.float64), torch.randn(HQ, dtype=torch.float64)))
    with pytest.raises(ValueError, match="v: .* the dtype of x"):
        step((*x[:3], x[3].float()))
    with pytest.raises(ValueError, match="feature_map"):
        step(feature_map="exp")
    with pytest.raises(ValueError, match="initial_state.ring_k"):
        step(state=state._replace(ring_k=state.ring_k[:, 1:]))
    with torch.enable_grad(), pytest.raises(ValueError, match="state: .*no_grad"):
        step((x[0].clone().requires_grad_(), *x[1:]))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(state, before, strict=True))
