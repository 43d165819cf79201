"""Scores of keys: their formula, read in any pieces, padded and packed, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lizard_layers import LOOK_AHEAD, KeyScore, ScoreState
from lizard_ops import NEVER, key_expiry

HIDDEN, HEADS, DIM, VALUES, WIDTH = 12, 2, 6, 5, 7
FLOAT32, FLOAT64 = dict(atol=2e-5, rtol=2e-5), dict(atol=1e-12, rtol=1e-12)


def module(dtype=torch.float64, disturbed: bool = True) -> KeyScore:
    made = KeyScore(HIDDEN, HEADS, DIM, WIDTH).to(dtype)
    if disturbed:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in made.parameters():
                p += 0.5 * torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p)
    return made


def inputs(length: int, batch: int = 1, dtype=torch.float64, seed: int = 1):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((HIDDEN,), (HEADS, DIM), (HEADS, VALUES))
    return [torch.randn(batch, length, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def formula(made: KeyScore, x, k, v) -> torch.Tensor:
    """Scores [T, Hk] of one text: s_j in the place of token j + 2, one key and head at a time, in Python's floats."""
    w, b, u, a, c = (
        p.detach().double().tolist()
        for p in (made.inner_weight, made.inner_bias, made.outer_weight, made.linear_weight, made.bias)
    )
    x, k, v = (t.double().tolist() for t in (x, k, v))
    length = len(x)
    scores = [[0.0] * HEADS for _ in range(length)]
    norm = math.hypot
    for j in range(length - 2):
        hidden = []
        for s in range(WIDTH):
            total = b[s]
            for o in (-1, 0, 1, 2):
                if j + o >= 0:
                    total += sum(p * q for p, q in zip(w[o + 1][s], x[j + o], strict=True))
            hidden.append(total * 0.5 * (1 + math.erf(total / math.sqrt(2))))
        for h in range(HEADS):
            mean = [sum(k[i][h][d] / norm(*k[i][h]) for i in range(j + 1)) / (j + 1) for d in range(DIM)]
            alike = sum(p * q for p, q in zip(k[j][h], mean, strict=True)) / norm(*k[j][h]) / norm(*mean)
            facts = (math.log(norm(*k[j][h])), math.log(norm(*v[j][h])), alike)
            scores[j + 2][h] = (
                sum(p * q for p, q in zip(u[h], hidden, strict=True))
                + sum(p * q for p, q in zip(a[h], facts, strict=True))
                + c[h]
            )
    return torch.tensor(scores, dtype=torch.float64).view(length, HEADS)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_the_formula(dtype, near):
    made, (x, k, v) = module(dtype), inputs(9, batch=2, dtype=dtype)
    scores, state = made(x, k, v)
    assert scores.dtype == dtype and state is None
    for row in range(2):
        wanted = formula(made, x[row], k[row], v[row])
        torch.testing.assert_close(scores[row].double(), wanted, **near)
    for length in range(4):
        torch.testing.assert_close(
            made(x[:1, :length], k[:1, :length], v[:1, :length])[0][0].double(),
            formula(made, x[0, :length], k[0, :length], v[0, :length]),
            **near,
        )


def test_bfloat16_is_read_in_float32_also_under_autocast():
    made, tokens = module(torch.float32).bfloat16(), inputs(9, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in made.parameters())
    wanted = formula(made, *(t[0] for t in tokens))
    with torch.autocast("cpu", torch.bfloat16):
        scores = made(*tokens)[0]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[0].double(), wanted, **FLOAT32)


def test_untrained_scores_are_those_of_keydiff():
    made, (x, k, v) = module(disturbed=False), inputs(9)
    scores = made(x, k, v)[0][0]
    for j in range(7):
        for h in range(HEADS):
            units = k[0, : j + 1, h] / k[0, : j + 1, h].norm(dim=-1, keepdim=True)
            mean = units.mean(0)
            alike = (units[-1] @ mean) / mean.norm()
            torch.testing.assert_close(scores[j + LOOK_AHEAD, h], -alike, **FLOAT64)


@settings(max_examples=25)
@given(pieces=st.lists(st.integers(0, 5), min_size=1, max_size=7), double=st.booleans())
def test_pieces_of_any_size_are_the_whole(pieces, double):
    """float64: to 1e-12; float32: to 2e-5 of scores around 1, the rounding of matrix products."""
    dtype, near = (torch.float64, FLOAT64) if double else (torch.float32, FLOAT32)
    made, tokens = module(dtype), inputs(sum(pieces), batch=2, dtype=dtype)
    whole, at_once = made(*tokens, use_state=True)
    state, parts, start = None, [], 0
    for piece in pieces:
        part, state = made(*(t[:, start : start + piece] for t in tokens), state, use_state=True)
        parts.append(part)
        start += piece
    torch.testing.assert_close(torch.cat(parts, 1), whole, **near)
    for field, wanted in zip(state, at_once, strict=True):
        assert field.dtype == wanted.dtype
        torch.testing.assert_close(field, wanted, **near)


def test_single_tokens_are_the_whole_after_a_long_text():
    made, tokens = module(torch.float32), inputs(300, dtype=torch.float32)
    whole = made(*tokens)[0]
    state, parts = None, []
    for t in range(300):
        part, state = made(*(z[:, t : t + 1] for z in tokens), state, use_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **FLOAT32)
    assert sum(t.numel() for t in state) == 1 + 3 * WIDTH + 2 * HEADS + HEADS * DIM


@settings(max_examples=25)
@given(masks=st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=3), cut=st.integers(0, 9))
def test_padding_anywhere_does_not_exist(masks, cut):
    """Two calls with a state between them, NaN at padding: each row's real tokens as if they stood alone."""
    made, mask = module(), torch.tensor(masks)
    tokens = inputs(9, batch=len(masks))
    for z in tokens:
        z[~mask] = torch.nan
    state, parts = None, []
    for part in (slice(0, cut), slice(cut, 9)):
        scores, state = made(*(z[:, part] for z in tokens), state, use_state=True, padding_mask=mask[:, part])
        parts.append(scores)
    scores = torch.cat(parts, 1)
    assert not scores[~mask].any()
    assert state.position.tolist() == mask.sum(1).tolist()
    for row, real in enumerate(mask):
        alone, left = made(*(z[row, real][None] for z in tokens), use_state=True)
        torch.testing.assert_close(scores[row, real], alone[0], **FLOAT64)
        for field, wanted in zip(state, left, strict=True):
            torch.testing.assert_close(field[row], wanted[0], **FLOAT64)


@settings(max_examples=25)
@given(
    first=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    second=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    wide=st.booleans(),
)
def test_packed_sequences_are_those_alone(first, second, wide):
    """Two packed calls of three sequences each, empty ones among them, with a state between."""
    made, state, parts = module(), None, [[], [], []]
    read = [[], [], []]
    for number, lengths in enumerate((first, second)):
        tokens = inputs(sum(lengths), seed=number)
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int64 if wide else torch.int32)
        scores, state = made(*tokens, state, use_state=True, cu_seqlens=ends)
        for n in range(3):
            parts[n].append(scores[0, ends[n] : ends[n + 1]])
            read[n].append([z[0, ends[n] : ends[n + 1]] for z in tokens])
    for n in range(3):
        alone, left = made(*(torch.cat(z)[None] for z in zip(*read[n], strict=True)), use_state=True)
        torch.testing.assert_close(torch.cat(parts[n]), alone[0], **FLOAT64)
        for field, wanted in zip(state, left, strict=True):
            torch.testing.assert_close(field[n], wanted[0], **FLOAT64)


def test_a_score_reads_two_tokens_ahead_and_no_further():
    made, tokens = module(), inputs(8)
    before = made(*tokens)[0]
    changed = [z.clone() for z in tokens]
    for z in changed:
        z[:, 5] += 1
    after = made(*changed)[0]
    assert torch.equal(before[:, :5], after[:, :5])  # keys 0 to 2
    assert (before != after)[:, 5:].all()


def test_gradients_are_slopes_with_padding_and_zero_keys():
    made, mask = module(), torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    tokens = [z.requires_grad_() for z in inputs(6, batch=2)]
    names = [name for name, _ in made.named_parameters()]

    def scores_of(x, k, v, *parameters):
        changed = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(made, changed, (x, k, v), dict(padding_mask=mask))[0]

    assert torch.autograd.gradcheck(scores_of, (*tokens, *made.parameters()), fast_mode=True)
    x, k, v = (z.detach().clone() for z in tokens)
    k[0, 2], v[1, 3], x[0, 0], k[0, 0] = 0, 0, torch.nan, torch.nan
    given = [z.requires_grad_() for z in (x, k, v)]
    scores = made(*given, padding_mask=mask)[0]
    assert scores.isfinite().all()
    for gradient in torch.autograd.grad(scores.square().sum(), [*given, *made.parameters()]):
        assert gradient.isfinite().all()


def test_rescaled_scores():
    made, tokens = module(), inputs(7)
    before = made(*tokens)[0][:, LOOK_AHEAD:]
    scale, shift = torch.tensor([2.0, 0.3]).double(), torch.tensor([-1.0, 4.0]).double()
    made.rescale(scale, shift)
    torch.testing.assert_close(made(*tokens)[0][:, LOOK_AHEAD:], scale * before + shift, **FLOAT64)


def test_statistics_are_those_the_scores_read():
    made, (x, k, v) = module(disturbed=False), inputs(7)
    for part in range(3):
        with torch.no_grad():
            made.linear_weight.zero_()[:, part] = 1
        torch.testing.assert_close(made(x, k, v)[0][:, LOOK_AHEAD:], made.statistics(k, v)[:, :-LOOK_AHEAD, :, part])


def test_starts_are_the_same_on_any_device_and_after_a_reset():
    one, other = module(torch.float32, disturbed=False), module(torch.float32)
    other.reset_parameters()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(KeyScore(HIDDEN, HEADS, DIM, WIDTH, seed=1).inner_weight, one.inner_weight)


def test_one_graph_holds_a_text_and_a_step():
    made, tokens = module(), inputs(6, batch=2)
    graph = torch.compile(made, backend="eager", fullgraph=True)
    with torch.no_grad():
        for part, state in ((slice(0, 5), None), (slice(5, 6), made(*(z[:, :5] for z in tokens), use_state=True)[1])):
            found, wanted = (form(*(z[:, part] for z in tokens), state, True) for form in (graph, made))
            assert torch.equal(found[0], wanted[0])
            assert all(map(torch.equal, found[1], wanted[1]))


def changed_state(**fields) -> ScoreState:
    return module().empty_state(2)._replace(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | dict(x=a["x"][0]), r"x: got shape \(5, 12\)"),
        (lambda a: a | dict(x=a["x"][..., :-1]), r"x: got .*wanted .*\(2, 5, 12\)"),
        (lambda a: a | dict(x=a["x"].long()), "x: got .*int64.*wanted a floating"),
        (lambda a: a | dict(k=a["k"][:, :-1]), r"k: got .*wanted .*\(2, 5, 2, 6\)"),
        (lambda a: a | dict(k=a["k"].to("meta")), "k: got .*on meta"),
        (lambda a: a | dict(v=a["v"][:, :, :1]), r"v: got .*wanted .*\(2, 5, 2, 5\)"),
        (lambda a: a | dict(padding_mask=torch.ones(2, 4).bool()), r"padding_mask: got .*\(2, 5\)"),
        (lambda a: a | dict(padding_mask=torch.ones(2, 5)), "padding_mask: got .*wanted a bool"),
        (
            lambda a: a | dict(padding_mask=torch.ones(2, 5).bool(), cu_seqlens=torch.tensor([0, 5])),
            "padding_mask: .*wanted None with cu_seqlens",
        ),
        (lambda a: a | dict(cu_seqlens=torch.tensor([0, 5])), "x: .*one row"),
        (lambda a: a | dict(cu_seqlens=torch.tensor([5])), r"cu_seqlens: .*\[N \+ 1\]"),
        (lambda a: a | dict(cu_seqlens=torch.tensor([0.0, 5.0])), "cu_seqlens: .*int32 or int64"),
        (lambda a: {n: t[:1] for n, t in a.items()} | dict(cu_seqlens=torch.tensor([0, 3, 2, 5])), "never falling"),
        (lambda a: {n: t[:1] for n, t in a.items()} | dict(cu_seqlens=torch.tensor([0, 4])), "5 last"),
        (lambda a: a | dict(state=module().empty_state(3)), r"state.position: got shape \(3,\)"),
        (lambda a: a | dict(state=tuple(module().empty_state(2))), "state: got a tuple, wanted a ScoreState"),
        (lambda a: a | dict(state=changed_state(position=torch.zeros(2))), "state.position: .*wanted a torch.int64"),
        (lambda a: a | dict(state=changed_state(inner=torch.zeros(2, 3, 9))), r"state.inner: .*\(2, 3, 7\)"),
    ],
)
def test_what_is_refused(change, message):
    given = change(dict(zip("xkv", inputs(5, batch=2), strict=True)))
    with pytest.raises(ValueError, match=message):
        module()(**given)


@pytest.mark.parametrize("name", ["hidden_size", "num_key_heads", "head_dim", "score_dim"])
@pytest.mark.parametrize("size", [0, 2.0, True])
def test_sizes_that_are_refused(name, size):
    sizes = dict(hidden_size=4, num_key_heads=2, head_dim=3, score_dim=5) | {name: size}
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {size}"):
        KeyScore(**sizes)


def test_late_scores_give_the_expiries_of_scores_in_time():
    """Two tokens late, in a window two shorter, behind two more anchors: ``forward`` says so."""
    late = module()(*inputs(60, batch=2))[0].detach()
    in_time = torch.cat([late[:, LOOK_AHEAD:], late.new_full((2, LOOK_AHEAD, HEADS), -torch.inf)], 1)  # unknown yet
    wanted = key_expiry(in_time, 7, 3, 5).expiry[:, :-LOOK_AHEAD]
    assert torch.equal(key_expiry(late, 7 - LOOK_AHEAD, 3 + LOOK_AHEAD, 5).expiry[:, LOOK_AHEAD:], wanted)
    assert (wanted < 60).any() and (wanted[:, 3:] == NEVER).any()
