"""Steps whose heads' places are divided among programs, against the step in PyTorch and against undivided ones."""

from __future__ import annotations

import importlib

import pytest
import test_pool
import test_triton_places
import torch
from kernel_checks import DEVICE, check_fields
from test_triton_kept_decode import ABSOLUTE, ALL, EXP, HALF, LEFT, MERGE, SUM, agree_on, make, steps

from lizard_ops import AttentionState, recurrent_hybrid_attn

parts = importlib.import_module("lizard_ops.hybrid_attn.triton.decode_parts")
decode = importlib.import_module("lizard_ops.hybrid_attn.triton.decode")
NEVER_DIVIDED = 1 << 30


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of four places where a head has more than two."""
    table = parts.config_for
    monkeypatch.setattr(parts, "UNDIVIDED", 2)
    monkeypatch.setattr(parts, "config_for", lambda *x: table(*x)._replace(rows=4, columns=16))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "fixed, places, delay, dtype",
    [
        (MERGE | {"gate": "key", "weight": "head", "B": 2, "Hk": 2}, 9, 0, torch.float32),
        (ABSOLUTE | {"gate": "token", "sinks": True, "weight": "token", "Hk": 2}, 20, 2, torch.float32),
        (MERGE | EXP | {"gate": "query", "anchors": 0, "G": 3}, 5, 2, torch.float32),
        (SUM | {"gate": "query", "weight": "token", "Hk": 2, "G": 1}, 4, 1, torch.float32),
        (SUM | ALL | {"gate": "key", "normalize": True, "sinks": True}, 7, 2, torch.float32),
        (MERGE | LEFT | {"gate": "key", "weight": "head", "B": 2, "Hk": 2}, 6, 0, torch.float32),
        (MERGE | {"gate": "key", "K": 16, "V": 16, "softcap": 1.5}, 70, 3, HALF),
    ],
)
def test_steps_are_those_of_pytorch(fixed, places, delay, dtype):
    agree_on(fixed, places, delay, dtype)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "fixed, places, delay, inplace",
    [
        (MERGE | {"gate": "key", "weight": "head", "B": 2}, (3, 0, 17), 0, True),
        (MERGE | {"gate": "query", "Hk": 2, "G": 2, "feature_map": "exp"}, (0, 5), 2, False),
        (SUM | ALL | {"gate": None, "normalize": True, "sinks": True}, (9, 4, 0), 2, True),
    ],
)
def test_steps_of_uneven_heads_are_those_of_pytorch(fixed, places, delay, inplace):
    test_triton_places.test_steps_are_those_of_pytorch(fixed, places, delay, inplace)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["kept keys", "places per head"])
def test_a_step_in_a_pool_is_that_on_the_states_alone(kind):
    test_pool.test_a_step_is_that_on_the_states_alone_bit_for_bit(kind, "triton")


@pytest.mark.usefixtures("small_parts")
@torch.no_grad()
def test_rows_have_the_same_bits_in_any_batch_and_twice():
    case = make(16, B=3, Hk=2, **MERGE | {"gate": "key"}).cast(torch.float32, DEVICE)
    whole, again, alone = (steps(c, "triton", kept_keys=9) for c in (case, case, case.part(slice(1, 2), slice(None))))
    for name, x in whole.items():
        assert torch.equal(x, again[name]), name
        assert torch.equal(x[1:2], alone[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("small_parts")
def test_a_captured_step_goes_on_by_itself():
    test_triton_places.test_a_captured_step_goes_on_by_itself()


GROUP, DIM, FEATURES, WINDOW, SEEN = 3, 64, 16, 16, 9000


def full(places, rows, coverage, dtype, seed=0):
    """(inputs of a token, options, the state before it): heads long past full but for a few empty places."""
    draw, heads = torch.Generator().manual_seed(seed), 3

    def normal(*shape):
        return torch.randn(rows, 1, *shape, generator=draw, dtype=torch.float64)

    x = {"q": normal(heads * GROUP, DIM), "k": normal(heads, DIM), "v": normal(heads, DIM)}
    x |= {"fq": normal(heads * GROUP, FEATURES), "fk": normal(heads, FEATURES)}
    x |= {"g": -normal(heads).exp() / 8, "scores": normal(heads).round()}
    x = {name: t.to(DEVICE, torch.float32 if name in ("g", "scores") else dtype) for name, t in x.items()}
    options = {"window": WINDOW, "anchors": 2, "kept_keys": places, "score_delay": 2, "output_final_state": True}
    options |= {"mix": "merge", "coverage": coverage, "feature_map": "softmax"}
    nothing = {name: t[:, :0] for name, t in x.items()}
    state = recurrent_hybrid_attn(**nothing, **options, impl="torch")[1]
    for name, t in state._asdict().items():
        if t is not None and t.is_floating_point():
            of = torch.randn(t.shape, generator=draw, dtype=torch.float64).to(DEVICE)
            t.copy_(-of.abs() / 64 if name.endswith("_g") else of.exp() if name in ("s", "z") else of)
    state.position.fill_(SEEN)
    uneven = isinstance(places, list)
    for row in range(rows):
        counts = places if uneven else [places] * heads
        held = [torch.randperm(SEEN - WINDOW, generator=draw)[:n] for n in counts]
        state.kept_positions[row].copy_(torch.cat(held) if uneven else torch.stack(held, 1))
    state.kept_scores.copy_(state.kept_scores.round())
    if seed % 2:  # among them the first of a part and the last of all
        for empty in (-1, 256, 300):
            state.kept_positions[:, empty], state.kept_scores[:, empty] = -1, -torch.inf
    return x, options, state


def copied(state, double=False):
    def one(name, t):
        keep = not double or not t.is_floating_point() or name in ("kept_scores", "ring_scores")
        return t.clone() if keep else t.double()

    return AttentionState(**{name: one(name, t) for name, t in state._asdict().items() if t is not None})


THOUSANDS = [
    ([2048, 8, 700], 2, "left", torch.float32, 0),
    ([16, 4096, 0], 1, "outside", torch.float32, 1),
    (1030, 2, "left", torch.float32, 1),
    ([3072, 600, 513], 1, "left", HALF, 0),
]


@torch.no_grad()
@pytest.mark.parametrize("places, rows, coverage, dtype, seed", THOUSANDS)
def test_thousands_of_places_beside_float64_divided_and_not(places, rows, coverage, dtype, seed, monkeypatch):
    x, options, state = full(places, rows, coverage, dtype, seed)

    def run(impl, double=False):
        given = {name: t.double() if double and name != "scores" else t for name, t in x.items()}
        o, after = recurrent_hybrid_attn(**given, **options, initial_state=copied(state, double), impl=impl)
        fields = {f"state.{name}": t for name, t in after._asdict().items() if t is not None}
        sums = {"state.s", "state.z", "state.log_scale"}  # their unit is a form's own
        return {"o": o} | {name: t for name, t in fields.items() if name not in sums}

    exact, plain = run("torch", double=True), run("torch")
    launched = watched(monkeypatch)
    check_fields(run("triton"), plain, exact, dtype)
    assert [name for name, _ in launched] == ["decode_parts_kernel", "hybrid_decode_kernel"]
    monkeypatch.setattr(parts, "UNDIVIDED", NEVER_DIVIDED)
    check_fields(run("triton"), plain, exact, dtype)
    assert [name for name, _ in launched[2:]] == ["hybrid_decode_kernel"]


@pytest.mark.usefixtures("small_parts")
def test_what_many_parts_leave_out_counts_once(monkeypatch):
    """18 parts a head, all places held: more than are added at once."""
    test_thousands_of_places_beside_float64_divided_and_not(70, 2, "left", torch.float32, 0, monkeypatch)


def watched(monkeypatch):
    """The name of each kernel that a step launches, and its constants."""
    launched = []
    for module in (parts, decode):
        launch = module.launch_kernel

        def noted(kernel, programs, *args, launch=launch, **constants):
            launched.append((kernel.fn.__name__, constants))
            launch(kernel, programs, *args, **constants)

        monkeypatch.setattr(module, "launch_kernel", noted)
    return launched


@torch.no_grad()
@pytest.mark.parametrize("places, divided", [(512, False), ([512, 8, 0], False), (513, True), ([8, 0, 513], True)])
def test_heads_of_few_places_are_not_divided(places, divided, monkeypatch):
    x, options, state = full(places, 1, "left", torch.float32)
    launched = watched(monkeypatch)
    monkeypatch.setattr(decode, "launch_kernel", lambda kernel, *_, **x: launched.append((kernel.fn.__name__, x)))
    monkeypatch.setattr(parts, "launch_kernel", lambda kernel, *_, **x: launched.append((kernel.fn.__name__, x)))
    recurrent_hybrid_attn(**x, **options, initial_state=copied(state), impl="triton")
    assert [name for name, _ in launched] == ["decode_parts_kernel"] * divided + ["hybrid_decode_kernel"]
    assert (launched[-1][1]["PART"] > 0) == divided
