"""Scores of keys: texts of one packed row do not reach each other; without data, compiled and exported."""

import math

import pytest
import torch
from test_key_score import DIM, FLOAT64, HEADS, HIDDEN, WIDTH, inputs, module
from torch.export import Dim, export

from lizard_layers import KeyScore, ScoreState

ENDS = torch.tensor([0, 4, 4, 9, 15])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["x", "k", "v"])
def test_what_is_not_finite_stays_in_its_text(name, value):
    """The other texts' scores and gradients are those of a row without it, bit for bit; its own say that it came."""
    made, scores, gradients = module(), [], []
    for bad in (None, value):
        tokens = dict(zip("xkv", inputs(15), strict=True))
        if bad is not None:
            tokens[name][0, 6] = bad  # in the text of tokens 4 to 8
        given = [t.requires_grad_() for t in tokens.values()]
        scores.append(made(*given, use_state=True, cu_seqlens=ENDS))
        gradients.append(torch.autograd.grad(scores[-1][0][0, [2, 3, 11, 14]].sum(), given))
    (clean, kept), (found, left) = scores
    others = [t for t in range(15) if not 4 <= t < 9]
    assert torch.equal(found[:, others], clean[:, others])
    assert not found[0, 8].isfinite().all()
    for field, wanted in zip(left, kept, strict=True):
        assert torch.equal(field[[0, 1, 3]], wanted[[0, 1, 3]])
    for have, wanted in zip(*gradients, strict=True):
        assert torch.equal(have[:, others], wanted[:, others])


def test_a_long_text_takes_no_digits_from_the_next():
    """40,000 keys of one direction, then a short text: the sum of its keys as exact as if it stood alone.

    A difference of running sums is off by 3e-12 here.
    """
    made, short = module(), inputs(7)
    long = [t[:, :1].expand(-1, 40_000, *t.shape[2:]) for t in short]
    ends = torch.tensor([0, 40_000, 40_007])
    scores, state = made(*(torch.cat(t, 1) for t in zip(long, short, strict=True)), use_state=True, cu_seqlens=ends)
    for h in range(HEADS):
        units = [[c / math.hypot(*key) for c in key] for key in short[1][0, :, h].tolist()]
        wanted = torch.tensor([math.fsum(column) for column in zip(*units, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(state.key_sum[1, h], wanted, rtol=0, atol=2e-15)
    torch.testing.assert_close(scores[:, 40_000:], made(*short)[0], rtol=1e-14, atol=1e-14)


ROWS = {
    "plain": {},
    "padded": dict(padding_mask=torch.arange(15) >= torch.tensor([[4], [0]])),
    "packed": dict(cu_seqlens=ENDS),
}


@pytest.mark.parametrize("kind", ROWS)
def test_shapes_are_known_without_data(kind):
    """On the meta device, as models are built that are too large for one."""
    made, tokens = KeyScore(HIDDEN, HEADS, DIM, WIDTH), inputs(15, batch=1 if kind == "packed" else 2)
    scores, state = made(*tokens, use_state=True, **ROWS[kind])
    options = {name: t.to("meta") for name, t in ROWS[kind].items()}
    made, tokens = made.to("meta"), [t.to("meta") for t in tokens]
    found, left = made(*tokens, use_state=True, **options)
    for have, wanted in zip((found, *left), (scores, *state), strict=True):
        assert have.device.type == "meta" and have.shape == wanted.shape and have.dtype == wanted.dtype
    assert made(*tokens, left, **options)[0].shape == scores.shape


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_one_graph_holds_rows_of_every_kind(kind):
    made, tokens = module(), inputs(15, batch=1 if kind == "packed" else 2)
    graph = torch.compile(made, backend="eager", fullgraph=True)
    state = None
    with torch.no_grad():
        for _ in range(2):
            found, wanted = (form(*tokens, state, True, **ROWS[kind]) for form in (graph, made))
            assert torch.equal(found[0], wanted[0]) and all(map(torch.equal, found[1], wanted[1]))
            state = wanted[1]


class Flat(torch.nn.Module):
    """A state as tensors of their own."""

    def __init__(self):
        super().__init__()
        self.score = module()

    def forward(self, x, k, v, position, inner, linear, key_sum, padding_mask=None, cu_seqlens=None):
        state = ScoreState(position, inner, linear, key_sum)
        scores, left = self.score(x, k, v, state, True, padding_mask, cu_seqlens)
        return scores, *left


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_one_export_serves_every_length_and_batch(kind):
    length, rows, texts, made = Dim("length"), Dim("rows"), Dim("texts"), Flat()
    packed = kind == "packed"
    row, per_text = {1: length} if packed else {0: rows, 1: length}, {0: texts if packed else rows}
    shapes = dict.fromkeys("xkv", row) | dict.fromkeys(ScoreState._fields, per_text)
    shapes |= {"padded": dict(padding_mask=row), "packed": dict(cu_seqlens={0: texts + 1})}[kind]
    state = made.score.empty_state(4 if packed else 2)
    given = inputs(15, batch=1 if packed else 2)
    program = export(made, (*given, *state), ROWS[kind], dynamic_shapes=shapes).module()
    for size in (1, 2, 40):
        given = inputs(size, batch=1 if packed else 3)
        before = made.score(*inputs(5, batch=3, seed=4), use_state=True)[1]
        options = {
            "padded": dict(padding_mask=torch.arange(size) >= torch.tensor([[0], [1], [9]])),
            "packed": dict(cu_seqlens=torch.tensor([0, size // 3, size // 3, size])),
        }[kind]
        for found, wanted in zip(program(*given, *before, **options), made(*given, *before, **options), strict=True):
            torch.testing.assert_close(found, wanted, **FLOAT64)
