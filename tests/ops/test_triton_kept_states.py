"""The kernels of kept keys between states against the reference, in the interpreter without a GPU."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from kernel_checks import DEVICE, check_fields
from op_cases import call, cases, state_in
from op_checks import one_of
from target_cases import in_segments, rows_of
from test_kept_state import in_order, scored

pytest.importorskip("lizard_ops.hybrid_attn.triton.kept_state")

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter gets bfloat16 wrong
MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "merge_mass": "relative"}
SUM = {"mix": "sum", "coverage": "outside", "normalize": False, "feature_map": "identity"}
EXP = {"feature_map": "exp"}
ALL, LEFT = {"coverage": "all"}, {"coverage": "left"}
LONG = 80 if DEVICE == "cuda" else 44  # longer than a chunk
SIZES = {"B": 1, "Hk": 1, "G": 2, "K": 16, "V": 16, "Fp": 8, "window": 5, "anchors": 2, "sink_form": "exp"}


def smaller(monkeypatch, segment):
    """Short sequences meet the boundaries of a long one: of segments, and in the interpreter of tiles too."""
    monkeypatch.setattr(importlib.import_module("lizard_ops.hybrid_attn.triton.kept_index"), "SEGMENT", segment)
    if DEVICE == "cuda":
        return
    shape = importlib.import_module("lizard_ops.hybrid_attn.triton.config").FusedShape
    launch = importlib.import_module("lizard_ops.tiles.launch").Launch
    monkeypatch.setattr(shape, "chunk", 16)
    monkeypatch.setattr(shape, "config", lambda self, kernel: launch(*(512, 1) if kernel == "scan" else (16, 16), 4, 1))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    smaller(monkeypatch, segment=32)


def make(length, seed=0, **fixed):
    sizes = SIZES | {"T": length, "sinks": False, "weight": None, "decay": 0.1}
    return scored(one_of(cases("hybrid", **(sizes | fixed))), seed)


def agree(case, cuts, dtype=torch.float32, **more):
    """Pieces by the kernels, one after the other, with one pass of the reference: outputs, and the state at the end."""
    with torch.no_grad():
        exact, plain = (in_order(call(case.cast(kind, DEVICE), "naive", **more)) for kind in (torch.float64, dtype))
        rounded = case.cast(dtype, DEVICE)
        found = in_order(
            in_segments(rounded, cuts, lambda part, state: call(part, "chunk", state, impl="triton", **more))
        )
    check_fields(found, plain, exact, dtype)


@pytest.mark.parametrize(
    "fixed, cuts, places, delay, dtype",
    [
        (MERGE | {"gate": "key", "weight": "head", "T": LONG}, (LONG - 10,), 7, 0, torch.float32),
        (MERGE | {"gate": "token", "sinks": True, "weight": "token", "Hk": 2, "G": 1}, (9, 30), 6, 2, torch.float32),
        (MERGE | EXP | {"gate": "query", "anchors": 0}, (20, 21), 3, 2, torch.float32),
        (SUM | {"gate": "key", "B": 2, "G": 1}, (3, 7, 25), 20, 1, torch.float32),
        (SUM | EXP | {"gate": None, "normalize": True, "window": 1}, (0, 17, 40), 4, 0, torch.float32),
        (SUM | ALL | {"gate": "key", "normalize": True, "V": 20}, (12,), 17, 2, torch.float32),
        (MERGE | ALL | EXP | {"gate": "token"}, (12, 33), 3, 0, torch.float32),
        (MERGE | {"gate": "key"}, (23,), 5, 3, HALF),
        (MERGE | LEFT | {"gate": "key", "weight": "head", "T": LONG}, (9, LONG - 10), 7, 2, torch.float32),
        (SUM | LEFT | EXP | {"gate": "query", "normalize": True}, (0, 20, 21), 3, 0, torch.float32),
    ],
)
def test_pieces_are_the_whole(fixed, cuts, places, delay, dtype):
    case = make(**({"length": fixed.get("T", 40)} | {n: x for n, x in fixed.items() if n != "T"}))
    agree(case, cuts, dtype, kept_keys=places, score_delay=delay)


@pytest.mark.parametrize(
    "gate, fixed, cuts", [("key", MERGE, (11, 34)), ("query", SUM, (25,)), ("key", MERGE | EXP, (30,))]
)
def test_resets_and_strong_decays(gate, fixed, cuts):
    """Beside a reset, in its piece and in later ones, keys of before it are nothing in the sums when they expire."""
    case = make(36, gate=gate, **fixed)
    kinds = torch.tensor([0.0, -1e-8, -0.1, -30.0, -torch.inf], dtype=torch.float64)
    odds = torch.tensor([8.0, 8.0, 8.0, 1.0, 1.0])
    drawn = kinds[odds.multinomial(36, True, generator=torch.Generator().manual_seed(3))]
    drawn[-4] = -torch.inf
    case.tokens["g"] = drawn.view(1, -1, 1).expand_as(case.tokens["g"]).clone()
    agree(case, cuts, kept_keys=4, score_delay=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_rows_with_states_of_their_own_are_those_of_pytorch(kind):
    """Sequences that have seen nothing, some and all of another text, and padding that adds nothing."""
    case = make(24, B=2, gate="key", **MERGE).cast(torch.float32, DEVICE)
    more = {"kept_keys": 4, "score_delay": 1}
    rows, given = rows_of(case, kind)
    first = case.part(slice(0, 1), slice(None))
    seen = (24, 0, 7)[: 3 if kind == "packed" else 2]
    past = [call(first.part(slice(None), slice(0, n)), "chunk", impl="triton", **more) for n in seen]
    state = state_in({n: torch.cat([x[n] for x in past]) for n in past[0] if "state." in n})
    found, wanted = (in_order(call(rows, "chunk", state, impl=impl, **more, **given)) for impl in ("triton", "torch"))
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=2e-5, atol=2e-6, msg=lambda m, name=name: name + m)


@torch.no_grad()
def test_steps_and_pieces_hand_states_on():
    """A piece, three tokens by the decode kernel, which leaves places in no order, and a piece."""
    case = make(26, gate="key", **MERGE).cast(torch.float32, DEVICE)
    more = {"kept_keys": 4, "impl": "triton"}
    forms = iter(["chunk", "recurrent", "recurrent", "recurrent", "chunk"])
    found = in_segments(case, [18, 19, 20, 21], lambda part, state: call(part, next(forms), state, **more))
    wanted = call(case, "naive", kept_keys=4)
    for name, x in in_order(found).items():
        torch.testing.assert_close(x, wanted[name], rtol=2e-5, atol=2e-6, msg=lambda m, name=name: name + m)


@torch.no_grad()
def test_no_token_leaves_the_state_as_it_is():
    case = make(20, gate="key", **MERGE).cast(torch.float32, DEVICE)
    nothing = case.part(slice(None), slice(0, 0))
    more = {"kept_keys": 4, "impl": "triton"}
    before = call(case, "chunk", **more)
    after = call(nothing, "chunk", state_in(before), **more)
    assert after["o"].shape[1] == 0
    assert all(torch.equal(x, after[name]) for name, x in before.items() if name != "o")
    blank = call(nothing, "chunk", **more)
    again = call(case, "chunk", state_in(blank), **more)
    for name, x in before.items():
        torch.testing.assert_close(again[name], x, rtol=2e-5, atol=2e-6)


@torch.no_grad()
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_compiles_to_one_graph(form):
    case = make(12, gate="key", **MERGE).cast(torch.float32, DEVICE)
    more = {"kept_keys": 2, "impl": "triton"}
    state = state_in(call(case.part(slice(None), slice(0, 8)), "chunk", **more))
    rest = case.part(slice(None), slice(8, 12 if form == "chunk" else 9))

    def step(tokens, state):
        return call(dataclasses.replace(rest, tokens=tokens), form, state, **more)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for wanted, found in zip(step(rest.tokens, state).values(), compiled(rest.tokens, state).values(), strict=True):
        torch.testing.assert_close(found, wanted)
