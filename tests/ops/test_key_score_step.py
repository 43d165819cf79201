"""Scores of keys token by token: the kernels against PyTorch in float64, and that against the text as a whole."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_checks import DEVICE, worst_excess

from lizard_layers import InWindow, KeyScore, ScoreState, WindowForm
from lizard_ops import KeyScoreState, KeyScoreWeights, ReceivedInputs, key_score_step

op = pytest.importorskip("lizard_ops.key_score.triton.op")

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter gets bfloat16 wrong
HIDDEN = 12
FORMS = {  # key heads, group, head dim, value dim, units; window, anchors, stride, softcap
    "plain": ((2, 1, 6, 5, 7), None),
    "one head": ((1, 1, 16, 16, 8), None),
    "odd": ((3, 2, 6, 5, 7), (7, 2, 3, 1.5)),
    "smallest": ((2, 1, 8, 8, 4), (3, 4, 1, None)),
    "no anchors": ((1, 4, 16, 8, 5), (5, 0, 2, None)),
    "few queries": ((2, 3, 8, 8, 4), (4, 1, 5, 0.8)),
    "tiles": ((1, 2, 8, 3, 4), (37, 19, 4, None)),
}


def module(form: str, dtype: torch.dtype) -> KeyScore:
    """With parameters far enough off their start for all of them to show."""
    (heads, _, dim, _, units), window = FORMS[form]
    draw = torch.Generator().manual_seed(3)
    received = None if window is None else WindowForm(*window[:3], 0.7, window[3])
    made = KeyScore(HIDDEN, heads, dim, units, received=received).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.5 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
        if made.received is not None:
            made.received.deviation.abs_().add_(0.5)
            made.received.outer_weight.mul_(4)
    return made.float().to(DEVICE, dtype).requires_grad_(False)


def tokens(form: str, length: int, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1):
    """x, q, k, v, whose heads lie beside each other as a joint projection leaves them; k of another kind than v."""
    (heads, group, dim, values, _), _ = FORMS[form]
    draw = torch.Generator().manual_seed(seed)
    shapes = (HIDDEN,), (heads * group + heads, dim), (values, heads)
    x, qk, v = (torch.randn(batch, length, *shape, generator=draw).to(DEVICE, dtype) for shape in shapes)
    return x, *qk.split((heads * group, heads), 2), v.transpose(2, 3)


def rings(form: str, k: torch.Tensor):
    """ring_k and anchor_k after the keys k [B, T, Hk, D], as an op leaves them."""
    window, anchors = FORMS[form][1][:2]
    ring, anchor = (k.new_zeros(k.shape[0], size, *k.shape[2:]) for size in (window, anchors))
    for j in range(max(0, k.shape[1] - window), k.shape[1]):
        ring[:, j % window] = k[:, j]
    held = min(k.shape[1], anchors)
    anchor[:, :held] = k[:, :held]
    return ring, anchor if anchors else None


def in_window(form: str, x, t: int) -> InWindow | None:
    _, q, k, _ = x
    return None if FORMS[form][1] is None else InWindow(q[:, t : t + 1], k[:, t : t + 1], *rings(form, k[:, :t]))


def steps(form: str, made: KeyScore, x, impl: str, inplace: bool = True):
    """Scores of all tokens, read one by one, and the fields of the last state by name."""
    state, scores = made.empty_state(x[0].shape[0]), []
    for t in range(x[0].shape[1]):
        step = [z[:, t : t + 1] for z in (x[0], x[2], x[3])]
        found, state = made(*step, state, True, seen=in_window(form, x, t), inplace=inplace, impl=impl)
        scores.append(found)
    return {"scores": torch.cat(scores, 1)} | state._asdict()


@pytest.mark.parametrize(
    "form, dtype", [*((form, torch.float32) for form in FORMS), ("plain", HALF), ("odd", HALF), ("no anchors", HALF)]
)
def test_kernels_are_pytorch_and_that_the_whole_text(form, dtype, monkeypatch):
    """From the first token to long past the window, in float32 sums whatever the inputs."""
    if form in ("odd", "tiles"):  # several tiles of heads and of window keys
        monkeypatch.setattr(op, "NUMBERS", 16)
        monkeypatch.setattr(op, "KEYS", 1)
    length = 48 if form == "tiles" else 19
    rounded = tokens(form, length, dtype=dtype)
    wide = tuple(z.double() for z in rounded)
    exact = steps(form, module(form, torch.float64), wide, "torch")
    plain, found = (steps(form, module(form, torch.float32), rounded, impl) for impl in ("torch", "triton"))
    seen = None if FORMS[form][1] is None else InWindow(wide[1], wide[2])
    whole, left = module(form, torch.float64)(wide[0], wide[2], wide[3], use_state=True, seen=seen)
    for name, wanted in ({"scores": whole} | left._asdict()).items():
        torch.testing.assert_close(exact[name], wanted, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        assert found[name].dtype == plain[name].dtype
        error = worst_excess(found[name], plain[name], wanted, torch.float32)
        assert error <= 1, f"{name}: {error:.3g} times the error that is allowed"


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("form", ["plain", "smallest"])
def test_in_place_is_the_same_where_the_state_was(form, impl):
    made, x = module(form, torch.float32), tokens(form, 6, dtype=torch.float32)
    start = made.empty_state(2)
    state, copy = start, type(start)(*(t.clone() for t in start))
    for t in range(6):
        step, seen = [z[:, t : t + 1] for z in (x[0], x[2], x[3])], in_window(form, x, t)
        before = [t.clone() for t in copy]
        wanted, new = made(*step, copy, True, seen=seen, impl=impl)
        assert all(map(torch.equal, before, copy))
        found, state = made(*step, state, True, seen=seen, inplace=True, impl=impl)
        assert torch.equal(found, wanted) and all(map(torch.equal, state, new))
        copy = new
    assert [t.data_ptr() for t in state] == [t.data_ptr() for t in start]


@pytest.mark.parametrize("form", ["plain", "smallest"])
def test_what_is_not_finite_stays_in_its_row_and_shows(form):
    for place in range(4) if form == "smallest" else (0, 2, 3):
        x, made = tokens(form, 5, dtype=torch.float32), module(form, torch.float32)
        clean = steps(form, made, x, "triton")
        bad = [z.clone() for z in x]
        bad[place][1, 2] = torch.nan
        found = steps(form, made, bad, "triton")
        assert torch.equal(found["scores"][0], clean["scores"][0])
        assert not found["scores"][1].isfinite().all()


def arguments(form: str = "odd", dtype: torch.dtype = torch.float32):
    """Of ``key_score_step``, after a few tokens."""
    made, x = module(form, dtype), tokens(form, 9, dtype=dtype)
    seen = None if FORMS[form][1] is None else InWindow(x[1][:, :8], x[2][:, :8])
    state = made(x[0][:, :8], x[2][:, :8], x[3][:, :8], use_state=True, seen=seen)[1]
    received = None
    if seen is not None:
        kind = made.window_form
        received = ReceivedInputs(
            *in_window(form, x, 8), made.received.weights(), kind.stride, kind.scale, kind.softcap
        )
    sums = (x[0][:, 8:] @ made.inner_weight.flatten(0, 1).T).contiguous()
    weights = KeyScoreWeights(made.inner_bias, made.outer_weight, made.linear_weight, made.bias)
    return dict(
        sums=sums,
        k=x[2][:, 8:],
        v=x[3][:, 8:],
        weights=weights,
        state=KeyScoreState(*(t.contiguous() for t in state)),
        received=received,
    )


def test_a_row_does_not_know_its_batch():
    given = arguments()
    scores, state = key_score_step(**given, impl="triton")
    one = [given[name][1:] for name in ("sums", "k", "v")]
    received = given["received"]
    of_row = received._replace(**{name: getattr(received, name)[1:] for name in ("q", "k", "ring_k", "anchor_k")})
    old = KeyScoreState(*(t[1:] for t in given["state"]))
    found, left = key_score_step(*one, given["weights"], old, received=of_row, impl="triton")
    assert torch.equal(found, scores[1:]) and all(torch.equal(a, b[1:]) for a, b in zip(left, state, strict=True))


def test_operator_is_well_formed():
    given = arguments()
    received, weights = given["received"], given["received"].weights
    tensors = (given["sums"], given["k"], given["v"], *given["weights"], *given["state"])
    tail = (received.q, received.k, received.ring_k, received.anchor_k, *weights, 3, 0.7, 1.5)
    torch.library.opcheck(op.step, (*tensors, *tail), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("form", ["plain", "odd"])
def test_compiles_to_one_graph_in_place(form):
    torch.compiler.reset()
    given, other = arguments(form), arguments(form)

    def call(given):
        return key_score_step(**given, inplace=True, impl="triton")[0] + 1

    found = torch.compile(call, backend="aot_eager", fullgraph=True)(given)
    assert torch.equal(found, call(other))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(given["state"], other["state"], strict=True))


def test_auto_takes_the_kernel_where_it_can(monkeypatch):
    api, seen = importlib.import_module("lizard_ops.key_score.api"), []
    monkeypatch.setattr(api, "choose_impl", lambda impl, like, beyond: seen.append(beyond) or "torch")
    given = arguments()
    mask = torch.tensor([[True], [False]], device=DEVICE)
    key_score_step(**given)
    scores, state = key_score_step(**given, padding_mask=mask)
    assert not scores[1].any() and all(torch.equal(a[1], b[1]) for a, b in zip(state, given["state"], strict=True))
    key_score_step(**arguments("plain", torch.float64))
    with_gradients = given | {"sums": given["sums"].clone().requires_grad_()}
    key_score_step(**with_gradients)
    assert seen == [None, "a padding_mask", "float64 tensors", "gradients"]
    with pytest.raises(ValueError, match="inplace: got True, wanted False where gradients are recorded"):
        key_score_step(**with_gradients, inplace=True)


def changed(given, **fields):
    received = given["received"]
    return given | {"received": received._replace(**{name: f(getattr(received, name)) for name, f in fields.items()})}


WRONG = {
    r"sums: got shape \(2, 2, 28\)": lambda a: a | dict(sums=a["sums"].expand(-1, 2, -1)),
    r"k: got .*wanted .*\(2, 1, 3, 6\)": lambda a: a | dict(k=a["k"].expand(-1, 2, -1, -1)),
    r"v: got .*wanted .*\(2, 1, 3, 5\)": lambda a: a | dict(v=a["v"][:1]),
    r"weights.outer_weight: got .*wanted .*\(3, 7\)": lambda a: (
        a | dict(weights=a["weights"]._replace(outer_weight=a["weights"].outer_weight[:2]))
    ),
    r"state.key_sum: got .*wanted a float64": lambda a: (
        a | dict(state=a["state"]._replace(key_sum=a["state"].key_sum.float()))
    ),
    r"state.ring: got None": lambda a: a | dict(state=a["state"]._replace(ring=None)),
    r"state.ring: got shape .*wanted None without received": lambda a: a | dict(received=None),
    r"state.inner: got strides .*contiguous with inplace": lambda a: (
        a | dict(state=a["state"]._replace(inner=a["state"].inner.mT.contiguous().mT), inplace=True)
    ),
    r"received.q: got .*a multiple of the 3": lambda a: changed(a, q=lambda q: q[:, :, :4]),
    r"received.ring_k: got .*at least 3": lambda a: changed(a, ring_k=lambda k: k[:, :2]),
    r"received.anchor_k: got .*float16": lambda a: changed(a, anchor_k=lambda k: k.half()),
    r"received.weights.mean: got .*\(3, 6\)": lambda a: changed(a, weights=lambda w: w._replace(mean=w.mean[:2])),
    r"received.stride: got 0": lambda a: changed(a, stride=lambda _: 0),
    r"padding_mask: got .*wanted a bool": lambda a: a | dict(padding_mask=torch.ones(2, 1)),
    r"impl: got 'triton'.*a padding_mask": lambda a: (
        a | dict(padding_mask=torch.ones(2, 1, dtype=torch.bool, device=DEVICE), impl="triton")
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        key_score_step(**WRONG[message](arguments()))


def test_nothing_to_overwrite_is_refused():
    x = tokens("plain", 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="inplace: got True, wanted False without a state"):
        module("plain", torch.float32)(x[0], x[2], x[3], inplace=True)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("form", ["plain", "odd", "tiles"])
def test_a_step_in_a_cuda_graph_goes_on_by_itself(form):
    """bfloat16 inputs; the state is updated where it lies, the position too: replays are steps."""
    made, x = module(form, torch.float32), tokens(form, 60, 3, torch.bfloat16)
    plain = FORMS[form][1] is None
    state, other = made.empty_state(3), made.empty_state(3)
    token, held = [z[:, :1].clone() for z in x], None if plain else list(rings(form, x[2][:, :0]))

    def step(state):
        seen = None if held is None else InWindow(token[1], token[2], *held)
        return made(token[0], token[2], token[3], state, True, seen=seen, inplace=True)[0]

    step(made.empty_state(3))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = step(state)
    for field in state:
        field.zero_()
    for t in range(60):
        for here, z in zip(token, x, strict=True):
            here.copy_(z[:, t : t + 1])
        for here, now in zip(held or (), () if plain else rings(form, x[2][:, :t]), strict=True):
            if here is not None:
                here.copy_(now)
        graph.replay()
        wanted, other = made(token[0], token[2], token[3], other, True, seen=in_window(form, x, t), impl="triton")
        assert torch.equal(scores, wanted), t
    assert all(map(torch.equal, state, other))
    assert isinstance(state, ScoreState) == plain
