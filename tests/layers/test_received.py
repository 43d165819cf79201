"""Scores that read what keys receive in their window: by formula, in any pieces, padded, packed, in place."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_checks import SHAPE, key_score, layer, received_facts, received_term
from layer_checks import inputs as layer_inputs
from test_moved_anchors import turned
from torch.export import Dim, export

from lizard_layers import (
    InWindow,
    KeyScore,
    ReceivingState,
    ScoreState,
    WindowForm,
    map_state,
    received,
    received_bands,
    tensors_of,
)

FLOAT64 = dict(atol=1e-11, rtol=1e-11)
FORMS = {
    "plain": dict(window=5, score_stride=2),
    "every query": dict(window=6, score_stride=1, anchors=3),
    "odd": dict(window=7, score_stride=3, anchors=2, softcap=1.5, scale=0.7),
    "capped": dict(window=4, score_stride=2, anchors=1, softcap=0.8),
    "smallest": dict(window=3, score_stride=1, anchors=4),
    "few queries": dict(window=4, score_stride=5),
    "fewer queries": dict(window=3, score_stride=7),
}


def module(**choices):
    return layer("received", **dict(dict(anchors=0), **choices))


def read(made, tokens, state=None, **options):
    """A call of the score alone; keys and queries are those the window sees. state: (of the score, ring, anchors)."""
    x, q, k, v = tokens
    past, *rings = (None, None, None) if state is None else state
    return made.key_score(x, k, v, past, True, seen=InWindow(q, k, *rings), **options)


def rings(config, texts):
    """ring_k and anchor_k after texts of keys [T, Hk, D] each, as an op leaves them."""
    ring = torch.zeros(len(texts), config.window, *texts[0].shape[1:], dtype=texts[0].dtype)
    anchor = torch.zeros(len(texts), config.anchors, *texts[0].shape[1:], dtype=texts[0].dtype)
    for n, k in enumerate(texts):
        for j in range(max(0, len(k) - config.window), len(k)):
            ring[n, j % config.window] = k[j]
        held = min(len(k), config.anchors)
        anchor[n, :held] = k[:held]
    return ring, anchor if config.anchors else None


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_scores_are_those_of_the_formula(form):
    """In the place of token t stands the score of key t - w + 1, and 0 where there is none."""
    made, length = module(**FORMS[form]), 15
    x, q, k, v, _ = layer_inputs(length, batch=1)
    found, state = read(made, (x, q, k, v))
    window, wanted, apart = made.config.window, torch.zeros_like(found), torch.zeros_like(found)
    assert made.config.score_delay == made.key_score.delay == window - 1
    for j in range(length - window + 1):
        for h in range(SHAPE["num_key_heads"]):
            base = key_score(made.key_score, x[0], k[0, :, h], v[0, :, h], h, j)
            wanted[0, j + window - 1, h] = base + received_term(made, k[0], v[0], q[0], k[0], h, j)
            apart[0, j + window - 1, h] = base
    torch.testing.assert_close(found, wanted, **FLOAT64)
    assert (wanted - apart)[:, window - 1 :].abs().min() > 1e-4
    assert isinstance(state, ReceivingState) and state.ring.shape == (1, window, 2, 7)
    facts = made.key_score.facts(k, v, InWindow(q, k))
    for j in range(length):  # of the last ones what they have received so far
        for h in range(SHAPE["num_key_heads"]):
            torch.testing.assert_close(facts[0, j, h, 3:], received_facts(made.config, q[0], k[0], h, j), **FLOAT64)


@torch.no_grad()
def test_what_is_received_is_at_least_its_floor():
    """A key that nothing looks at, and one that no query counts for."""
    made = module(window=8, score_stride=2)
    x, q, k, v, _ = layer_inputs(12, batch=1)
    q, k = 40 * q.abs(), k.clone()
    k[0, 2], k[0, 3] = -k[0, 2].abs(), k[0, 3].abs()
    facts = made.key_score.facts(k, v, InWindow(q, k))[0, ..., 3:]
    assert torch.equal(facts[2], torch.full_like(facts[2], math.log(1e-7)))
    assert (facts[3, :, 2] > -1).all()
    assert torch.equal(facts[10:], torch.full_like(facts[10:], math.log(1e-7)))  # 12 and 13 would be the first


@settings(max_examples=20, deadline=None, derandomize=True)
@given(form=st.sampled_from(list(FORMS)), data=st.data())
@torch.no_grad()
def test_pieces_padding_and_packing_change_nothing(form, data):
    """Three texts, each in two or three calls, as rows with padding (NaN in it) or packed: scores and states."""
    made, packed = module(**FORMS[form]), data.draw(st.booleans())
    lengths = data.draw(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=3))
    read_so_far, state, parts = [[t[0, :0] for t in layer_inputs(1, 1)[:4]] for _ in range(3)], None, [[], [], []]
    for call, counts in enumerate(lengths):
        past = None if state is None else (state, *rings(made.config, [text[2] for text in read_so_far]))
        if packed:
            tokens = layer_inputs(sum(counts), 1, seed=call)[:4]
            ends = torch.tensor([0, *counts]).cumsum(0)
            here = [[t[0, ends[n] : ends[n + 1]] for t in tokens] for n in range(3)]
            scores, state = read(made, tokens, past, cu_seqlens=ends)
            found = [scores[0, ends[n] : ends[n + 1]] for n in range(3)]
        else:
            size = data.draw(st.sampled_from([max(counts), max(counts) + 2]))
            order = [data.draw(st.permutations(range(size))) for _ in counts]
            mask = torch.zeros(3, size, dtype=torch.bool)
            for n, count in enumerate(counts):
                mask[n, order[n][:count]] = True
            tokens = layer_inputs(size, 3, seed=call)[:4]
            for t in tokens:
                t[~mask] = torch.nan
            here = [[t[n, mask[n]] for t in tokens] for n in range(3)]
            scores, state = read(made, tokens, past, padding_mask=mask)
            assert not scores[~mask].any()
            found = [scores[n, mask[n]] for n in range(3)]
        for n in range(3):
            parts[n].append(found[n])
            read_so_far[n] = [torch.cat(both) for both in zip(read_so_far[n], here[n], strict=True)]
    for n, text in enumerate(read_so_far):
        alone, left = read(made, [t[None] for t in text])
        torch.testing.assert_close(torch.cat(parts[n]), alone[0], **FLOAT64)
        for name, field in state._asdict().items():
            torch.testing.assert_close(field[n], getattr(left, name)[0], **FLOAT64, msg=f"{name} of text {n}")


@pytest.mark.parametrize("form", ["odd", "smallest", "few queries"])
@torch.no_grad()
def test_steps_are_the_whole(form):
    """Single tokens of two rows, one of which rests for a while, with NaN in its place."""
    made, length = module(**FORMS[form]), 40
    x, q, k, v, _ = layer_inputs(length)
    wanted = [read(made, [t[n : n + 1] for t in (x, q, k, v)]) for n in range(2)]
    state, seen, parts = made.key_score.empty_state(2), [0, 0], [[], []]
    for t in range(length + 9):
        moves = [n == 1 or not 11 <= t < 20 for n in range(2)]
        moves = [move and at < length for move, at in zip(moves, seen, strict=True)]
        places = [min(at, length - 1) for at in seen]
        tokens = [torch.stack([z[n, place] for n, place in enumerate(places)])[:, None] for z in (x, q, k, v)]
        for n in range(2):
            if not moves[n]:
                for z in tokens:
                    z[n] = torch.nan
        held = rings(made.config, [k[n, : seen[n]] for n in range(2)])
        scores, state = read(made, tokens, (state, *held), padding_mask=torch.tensor(moves)[:, None])
        for n in range(2):
            if moves[n]:
                parts[n].append(scores[n])
                seen[n] += 1
    for n in range(2):
        torch.testing.assert_close(torch.cat(parts[n]), wanted[n][0][0], **FLOAT64)
        for name, field in state._asdict().items():
            torch.testing.assert_close(field[n], getattr(wanted[n][1], name)[0], **FLOAT64, msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 11])
@torch.no_grad()
def test_short_texts_are_those_of_the_packed_form(form, length):
    """From the start by bands, packed by a gather."""
    made, tokens = module(**FORMS[form]), layer_inputs(length, batch=1)[:4]
    (found, state), (wanted, left) = (read(made, tokens, cu_seqlens=c) for c in (None, torch.tensor([0, length])))
    torch.testing.assert_close(found, wanted, **FLOAT64)
    for name, field in state._asdict().items():
        torch.testing.assert_close(field, getattr(left, name), **FLOAT64)


@pytest.mark.parametrize("numbers", [1, 300])
@torch.no_grad()
def test_a_long_text_is_read_in_blocks(monkeypatch, numbers):
    made, tokens = module(**FORMS["odd"]), layer_inputs(70, batch=1)[:4]
    whole = read(made, tokens)
    for form, of, packed in ((received, "_weights", torch.tensor([0, 70])), (received_bands, "_of_blocks", None)):
        monkeypatch.setattr(form, "NUMBERS", numbers)
        calls, weigh = [], getattr(form, of)
        monkeypatch.setattr(form, of, lambda *a, weigh=weigh, calls=calls: calls.append(a) or weigh(*a))
        blocks = read(made, tokens, cu_seqlens=packed)
        torch.testing.assert_close(blocks[0], whole[0], **FLOAT64)
        torch.testing.assert_close(blocks[1].ring, whole[1].ring, **FLOAT64)
        assert len(calls) > 3


@pytest.mark.parametrize("name", ["x", "q", "k", "v"])
@torch.no_grad()
def test_what_is_not_finite_stays_in_its_text(name):
    made, ends, scores = module(**FORMS["odd"]), torch.tensor([0, 9, 20, 29]), []
    for bad in (None, torch.nan):
        tokens = dict(zip("xqkv", layer_inputs(29, batch=1)[:4], strict=True))
        if bad is not None:
            tokens[name][0, 11] = bad
        scores.append(read(made, list(tokens.values()), cu_seqlens=ends))
    (clean, kept), (found, left) = scores
    others = [t for t in range(29) if not 9 <= t < 20]
    assert torch.equal(found[:, others], clean[:, others]) and not found[:, 9:20].isfinite().all()
    assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(kept, left, strict=True))


@pytest.mark.parametrize("kind", ["padded", "packed"])
@torch.no_grad()
def test_one_graph_holds_a_text_and_a_step(kind):
    torch.compiler.reset()  # forms of the same forward that other tests asked for count towards a limit
    made = module(**FORMS["odd"])
    x, q, k, v, _ = layer_inputs(13, batch=1 if kind == "packed" else 2)
    options = {
        "padded": dict(padding_mask=torch.arange(12) >= torch.tensor([[4], [0]])),
        "packed": dict(cu_seqlens=torch.tensor([0, 5, 12])),
    }[kind]

    def call(form, part, state=None, **given):
        at = InWindow(q[:, part], k[:, part], *(() if state is None else state[1:]))
        return form(x[:, part], k[:, part], v[:, part], None if state is None else state[0], True, seen=at, **given)

    graph = torch.compile(made.key_score, backend="eager", fullgraph=True)
    found, wanted = (call(form, slice(0, 12), **options) for form in (graph, made.key_score))
    assert torch.equal(found[0], wanted[0]) and all(map(torch.equal, found[1], wanted[1]))
    if kind == "packed":
        return
    real = options["padding_mask"]
    state = (wanted[1], *rings(made.config, [k[n, :12][real[n]] for n in range(2)]))
    found, wanted = (call(form, slice(12, 13), state) for form in (graph, made.key_score))
    assert torch.equal(found[0], wanted[0]) and all(map(torch.equal, found[1], wanted[1]))


class Flat(torch.nn.Module):
    """A state as tensors of their own."""

    def __init__(self):
        super().__init__()
        self.score = module(**FORMS["odd"]).key_score

    def forward(self, x, q, k, v, ring, anchor, position, inner, linear, key_sum, held, padding_mask):
        state = ReceivingState(position, inner, linear, key_sum, held)
        scores, left = self.score(x, k, v, state, True, padding_mask, None, InWindow(q, k, ring, anchor))
        return scores, *left


@torch.no_grad()
def test_one_export_serves_every_length_and_batch():
    length, rows, made = Dim("length"), Dim("rows"), Flat()
    row, per_text = {0: rows, 1: length}, {0: rows}

    def given(batch, size):
        past, *tokens = layer_inputs(9, batch)[:4], *layer_inputs(size, batch, seed=2)[:4]
        held = rings(layer("received", **FORMS["odd"]).config, list(past[2]))
        mask = torch.arange(size) >= torch.arange(batch)[:, None]
        return (*tokens, *held, *read(module(**FORMS["odd"]), past)[1], mask)

    shapes = dict.fromkeys("xqkv", row) | dict.fromkeys(("ring", "anchor"), per_text)
    shapes |= dict.fromkeys(("position", "inner", "linear", "key_sum", "held"), per_text) | dict(padding_mask=row)
    program = export(made, given(2, 15), dynamic_shapes=shapes).module()
    for batch, size in ((3, 1), (1, 2), (2, 40)):
        for found, wanted in zip(program(*given(batch, size)), made(*given(batch, size)), strict=True):
            torch.testing.assert_close(found, wanted, **FLOAT64)


@pytest.mark.parametrize("form", ["received", "received_by_each"])
@torch.no_grad()
def test_steps_in_place_are_steps(form):
    made, (x, q, k, v, rope) = layer(form), layer_inputs(26)
    part = slice(0, 6)
    other = made(*(t[:, part] for t in (x, q, k, v)), tuple(t[:, part] for t in rope), use_state=True)[1]
    state = map_state(other, lambda t: t.clone(memory_format=torch.contiguous_format))
    places = {name: t.data_ptr() for name, t in tensors_of(state).items()}
    for t in range(6, 26):
        step = [z[:, t : t + 1] for z in (x, q, k, v)]
        turn = tuple(z[:, t : t + 1] for z in rope)
        wanted, other = made(*step, turn, other, use_state=True)
        found, state = made(*step, turn, state, use_state=True, inplace=True)
        assert torch.equal(found, wanted)
    assert places == {name: t.data_ptr() for name, t in tensors_of(state).items()}
    assert all(torch.equal(t, tensors_of(other)[name]) for name, t in tensors_of(state).items())


@torch.no_grad()
def test_half_precision_reads_what_the_window_reads():
    """Keys and queries in bfloat16, weights and sums in float32: what remains is the inputs' own rounding."""
    made = module(**FORMS["odd"]).float()
    tokens = [t.bfloat16() for t in layer_inputs(30)[:4]]
    found, state = read(made, tokens)
    exact = read(made.double(), [t.double() for t in tokens])[0]
    assert state.ring.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rescaled_scores():
    made, (x, q, k, v, _) = module(**FORMS["odd"]), layer_inputs(15)
    before = read(made, (x, q, k, v))[0][:, 6:]
    scale, shift = torch.tensor([2.0, 0.3]).double(), torch.tensor([-1.0, 4.0]).double()
    made.key_score.rescale(scale, shift)
    torch.testing.assert_close(read(made, (x, q, k, v))[0][:, 6:], scale * before + shift, **FLOAT64)


@torch.no_grad()
def test_a_fresh_term_says_nothing_and_is_set_by_its_sample():
    made, (x, q, k, v, _) = module(window=5, disturbed=False), layer_inputs(15)
    late, early = read(made, (x, q, k, v))[0], KeyScore(24, 2, 8, 6).double()(x, k, v)[0]
    torch.testing.assert_close(late[:, 4:], early[:, 2:-2], **FLOAT64)
    facts = made.key_score.facts(k, v, InWindow(q, k)).flatten(0, 1)
    made.key_score.received.standardise(facts)
    plain = (facts - made.key_score.received.mean) / made.key_score.received.deviation
    torch.testing.assert_close(plain.mean(0), torch.zeros(2, 6).double(), **FLOAT64)
    torch.testing.assert_close(plain.square().mean(0), torch.ones(2, 6).double(), **FLOAT64)
    assert {"received.mean", "received.deviation"} < made.key_score.state_dict().keys()
    made.key_score.bfloat16()
    assert {t.dtype for t in made.key_score.state_dict().values()} == {torch.float64}


WRONG = {
    r"seen: got None, wanted queries": lambda a: a | dict(seen=None),
    r"seen.q: got shape \(2, 5, 3, 8\)": lambda a: a | dict(seen=a["seen"]._replace(q=a["seen"].q[:, :, :3])),
    r"seen.q: got .*wanted .*\(2, 5, 4, 8\)": lambda a: a | dict(seen=a["seen"]._replace(q=a["seen"].q[:, :4])),
    r"seen.k: got .*wanted .*\(2, 5, 2, 8\)": lambda a: a | dict(seen=a["seen"]._replace(k=a["seen"].k[..., :4])),
    r"seen.ring_k: got None": lambda a: a | dict(state=layer("received").key_score.empty_state(2)),
    r"seen.ring_k: got shape \(2, 4, 2, 8\).*wanted \[N, 5, 2, 8\]": lambda a: (
        a | dict(seen=a["seen"]._replace(ring_k=torch.zeros(2, 4, 2, 8)))
    ),
    r"seen.anchor_k: got shape \(2, 3, 2, 8\).*wanted \[N, 2, 2, 8\]": lambda a: (
        a | dict(seen=a["seen"]._replace(anchor_k=torch.zeros(2, 3, 2, 8)))
    ),
    r"state: got a ScoreState, wanted a ReceivingState": lambda a: (
        a | dict(state=KeyScore(24, 2, 8, 6).empty_state(2), seen=InWindow(*a["seen"][:2], *rings_of_five()))
    ),
}


def rings_of_five():
    return torch.zeros(2, 5, 2, 8), torch.zeros(2, 2, 2, 8)


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(message):
    x, q, k, v, _ = layer_inputs(5)
    given = WRONG[message](dict(x=x, k=k, v=v, seen=InWindow(q, k)))
    with pytest.raises(ValueError, match=message):
        layer("received").key_score(**given)
    assert isinstance(KeyScore(24, 2, 8, 6).empty_state(2), ScoreState)


def test_what_does_not_belong_together_is_refused():
    x, q, k, v, _ = layer_inputs(5)
    with pytest.raises(ValueError, match="seen: got queries and keys, wanted None"):
        layer("kept").key_score(x, k, v, seen=InWindow(q, k))
    with pytest.raises(ValueError, match="received: got a window of 2, wanted at least 3"):
        KeyScore(24, 2, 8, 6, received=WindowForm(2, 0, 1, 1.0))


@torch.no_grad()
def test_moved_anchors_are_those_the_window_sees():
    """Their weights take part in every denominator: scores with anchors moved on are others."""
    made, (x, q, k, v, rope) = layer("received", kept_keys=1), layer_inputs(24)
    first = made(*(t[:, :8] for t in (x, q, k, v)), tuple(t[:, :8] for t in rope), use_state=True)[1]
    ends, rings_left = [], []
    for cuts in ([8, 24], [8, 9, 15, 24], range(8, 25)):
        state = first
        for a, b in zip(cuts, cuts[1:], strict=False):
            block = turned((9, 4), (True, True), b - a)
            here = [t[:, a:b] for t in (x, q, k, v)]
            state = made(*here, tuple(t[:, a:b] for t in rope), state, True, anchor_blocks=[block])[1]
        ends.append(state.attention.kept_positions), rings_left.append(state.score.ring)
    assert all(torch.equal(end, ends[0]) for end in ends)
    for ring in rings_left:
        torch.testing.assert_close(ring, rings_left[0], **FLOAT64)
    still = made(*(t[:, 8:] for t in (x, q, k, v)), tuple(t[:, 8:] for t in rope), first, True)[1]
    assert (still.score.ring - rings_left[0])[..., 4:].abs().max() > 1e-3
