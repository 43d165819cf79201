"""The kernels where heads keep different numbers of keys against the reference, in the interpreter without a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_checks import DEVICE, check_fields
from op_cases import call, cases, state_in
from op_checks import one_of, with_gradients
from target_cases import in_segments
from test_kept_state import scored
from test_places_in_states import in_order

pytest.importorskip("lizard_ops.hybrid_attn.triton.kept_state")

MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "merge_mass": "relative"}
SUM = {"mix": "sum", "coverage": "outside", "normalize": False, "feature_map": "identity"}
SIZES = {"B": 1, "Hk": 3, "G": 1, "K": 16, "V": 16, "Fp": 8, "window": 5, "anchors": 2, "sink_form": "exp"}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """So that short sequences meet the boundaries of a long one."""
    monkeypatch.setattr(importlib.import_module("lizard_ops.hybrid_attn.triton.kept_index"), "SEGMENT", 32)


def make(length, **fixed):
    return scored(
        one_of(cases("hybrid", **(SIZES | {"T": length, "sinks": False, "weight": None, "decay": 0.1} | fixed)))
    )


def compare(found, plain, exact):
    check_fields(found, plain, exact, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize(
    "fixed, cuts, places, delay",
    [
        (MERGE | {"gate": "key", "weight": "head"}, (23,), (7, 0, 2), 0),
        (MERGE | {"gate": "query", "Hk": 2, "G": 2, "feature_map": "exp"}, (9, 25), (0, 5), 2),
        (SUM | {"gate": None, "coverage": "all", "normalize": True, "Hk": 2}, (12,), (1, 9), 1),
    ],
)
def test_pieces_are_the_whole(fixed, cuts, places, delay):
    case, more = make(30, **fixed), {"kept_keys": places, "score_delay": delay}
    exact, plain = (
        in_order(call(case.cast(x, DEVICE), "naive", **more), places) for x in (torch.float64, torch.float32)
    )
    rounded = case.cast(torch.float32, DEVICE)
    pieces = in_segments(rounded, cuts, lambda part, state: call(part, "chunk", state, impl="triton", **more))
    compare(in_order(pieces, places), plain, exact)


@torch.no_grad()
@pytest.mark.skipif(DEVICE == "cpu", reason="hours in the interpreter")
def test_thousands_of_places_in_pieces_and_steps():
    """Beside PyTorch's own, handed on as often: each time the sums of gates, of hundreds here, are rounded."""
    fixed = MERGE | {"gate": "key", "weight": "head", "K": 64, "V": 64, "window": 128}
    case, places, cuts = make(4500, **fixed), (4096, 16, 1024), (4300, 4496, 4497, 4498, 4499)

    def run(dtype, impl):
        def step(part, state):
            return call(part, "recurrent" if part.length == 1 else "chunk", state, impl=impl, kept_keys=places)

        return in_order(in_segments(case.cast(dtype, DEVICE), cuts, step), places)

    compare(run(torch.float32, "triton"), run(torch.float32, "torch"), run(torch.float64, "torch"))


def test_gradients_without_a_state():
    case, more = make(24, **MERGE | {"gate": "key", "Hk": 2}), {"kept_keys": (6, 1), "final": False}
    scores = case.tokens.pop("scores")

    def of(form, dtype, **given):
        def step(c):
            c.tokens["scores"] = scores.to(DEVICE)
            return call(c, form, **more, **given)

        return with_gradients(step, case.cast(dtype, DEVICE))

    compare(of("chunk", torch.float32, impl="triton"), of("naive", torch.float32), of("naive", torch.float64))


def steps(case, impl, state, inplace, places, delay):
    """One token after the other from a state: outputs, and the fields at the end, places where they lie."""
    outputs, more = [], {"kept_keys": places, "score_delay": delay, "impl": impl, "inplace": inplace}
    for t in range(case.length):
        found = call(case.part(slice(None), slice(t, t + 1)), "recurrent", state, **more)
        outputs.append(found.pop("o"))
        state = state_in(found)
    return {"o": torch.cat(outputs, 1), **found}


@torch.no_grad()
@pytest.mark.parametrize(
    "fixed, places, delay, inplace",
    [
        (MERGE | {"gate": "key", "weight": "head", "B": 2}, (3, 0, 17), 0, True),
        (MERGE | {"gate": "query", "Hk": 2, "G": 2, "feature_map": "exp", "anchors": 0}, (0, 5), 2, True),
        (SUM | {"gate": "token", "weight": "token", "Hk": 2}, (1, 9), 1, False),
        (SUM | {"gate": None, "coverage": "all", "normalize": True, "sinks": True}, (2, 1, 0), 2, True),
    ],
)
def test_steps_are_those_of_pytorch(fixed, places, delay, inplace):
    """Places by places, from nothing to long past full: the kernel overwrites the one that PyTorch does."""
    case = make(20, **fixed, V=8, K=8, Fp=4, window=4)

    def run(dtype, impl, inplace=False):
        there = case.cast(dtype, DEVICE)
        nothing = call(there.part(slice(None), slice(0, 0)), "chunk", kept_keys=places, score_delay=delay, impl="torch")
        state = state_in({name: x.contiguous() for name, x in nothing.items()})
        return steps(there, impl, state, inplace, places, delay)

    compare(run(torch.float32, "triton", inplace), run(torch.float32, "torch"), run(torch.float64, "torch"))


@torch.no_grad()
def test_pieces_and_steps_hand_states_on():
    """A piece, steps in place, which leave places in no order and tensors where they were, and a piece."""
    case, more = make(26, **MERGE | {"gate": "key"}).cast(torch.float32, DEVICE), {"kept_keys": (4, 0, 2)}
    wanted = in_order(call(case, "naive", **more), more["kept_keys"])
    state = state_in(call(case.part(slice(None), slice(0, 18)), "chunk", impl="triton", **more))
    state = state._replace(**{n: x.clone() for n, x in state._asdict().items() if x is not None})
    addresses = [None if x is None else x.data_ptr() for x in state]
    middle = steps(case.part(slice(None), slice(18, 22)), "triton", state, True, (4, 0, 2), 0)
    assert [None if x is None else x.data_ptr() for x in state] == addresses
    found = call(case.part(slice(None), slice(22, 26)), "chunk", state, impl="triton", **more)
    torch.testing.assert_close(middle["o"], wanted["o"][:, 18:22], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found.pop("o"), wanted.pop("o")[:, 22:], rtol=2e-5, atol=2e-6)
    for name, x in in_order(found, more["kept_keys"]).items():
        torch.testing.assert_close(x, wanted[name], rtol=2e-5, atol=2e-6, msg=lambda m, name=name: name + m)


@torch.no_grad()
@pytest.mark.parametrize("places", [6, (6, 0, 3)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("form", ["steps", "piece"])
def test_what_an_emptied_place_still_holds_is_seen_by_none(form, impl, places):
    """Places that a caller empties by their positions and scores, whatever lies in them, are taken again first."""
    case, more = make(26, **MERGE | {"gate": "key", "coverage": "left"}), {"kept_keys": places}
    case = case.cast(torch.float32, DEVICE)
    state = state_in(call(case.part(slice(None), slice(0, 18)), "chunk", impl="torch", **more))
    gone = (state.kept_positions >= 0) & (state.kept_positions < 9)
    assert gone.any() and not gone.all()
    told = {
        "kept_positions": state.kept_positions.masked_fill(gone, -1),
        "kept_scores": state.kept_scores.masked_fill(gone, -torch.inf),
    }
    empty = {n: getattr(state, n).masked_fill(gone.unsqueeze(-1), 0.0) for n in ("kept_k", "kept_v")}
    rest, found = case.part(slice(None), slice(18, 26)), []
    for held in (empty, {n: torch.where(gone.unsqueeze(-1), 1e4, getattr(state, n)) for n in empty}):
        given = state._replace(**told, **held)
        given = given._replace(**{n: x.clone() for n, x in given._asdict().items() if x is not None})
        if form == "steps":
            found.append(steps(rest, impl, given, True, places, 0)["o"])
        else:
            found.append(call(rest, "chunk", given, impl=impl, **more)["o"])
    assert torch.equal(*found)


def test_the_step_is_well_formed():
    case, places = make(9, **MERGE | {"gate": "key", "window": 4, "anchors": 1}).cast(torch.float32, DEVICE), (2, 0, 1)
    decode = importlib.import_module("lizard_ops.hybrid_attn.triton.decode")
    with torch.no_grad():
        state = state_in(call(case.part(slice(None), slice(0, 8)), "chunk", impl="torch", kept_keys=places))
    x = case.part(slice(None), slice(8, 9)).tokens
    inputs = (x["q"], x["k"], x["v"], x["fq"], x["fk"], x["g"], None, None, *state)
    tail = (4, 1, True, True, True, "softmax", True, 0.3, 1.0, None, x["scores"].float(), places)
    torch.library.opcheck(decode.hybrid_decode, (*inputs, *tail), test_utils=("test_schema", "test_faketensor"))


def test_auto_takes_the_kernel_on_a_gpu(monkeypatch):
    case, more = make(9, **MERGE | {"gate": "key"}).cast(torch.float32, DEVICE), {"kept_keys": (2, 0, 1)}
    with torch.no_grad():
        state = state_in(call(case.part(slice(None), slice(0, 8)), "chunk", impl="torch", **more))
    seen, api = [], importlib.import_module("lizard_ops.hybrid_attn.api")
    monkeypatch.setattr(api, "choose_impl", lambda impl, like, beyond: seen.append(beyond) or "torch")
    with torch.no_grad():
        call(case.part(slice(None), slice(8, 9)), "recurrent", state, **more)
        call(case, "chunk", **more)
    assert seen == [None, None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_captured_step_goes_on_by_itself():
    case, places = make(40, **MERGE | {"gate": "key", "B": 2}).cast(torch.float32, "cuda"), (3, 0, 9)
    more = {"kept_keys": places, "impl": "triton"}
    wanted = in_order(call(case, "naive", kept_keys=places), places)
    state = state_in(call(case.part(slice(None), slice(0, 20)), "chunk", **more))
    state = state._replace(**{n: x.contiguous() for n, x in state._asdict().items() if x is not None})
    token = case.part(slice(None), slice(20, 21)).map(lambda _, x: x.clone())
    before = [None if x is None else x.clone() for x in state]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(token, "recurrent", state, inplace=True, **more)  # compiles, and makes what is made once
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call(token, "recurrent", state, inplace=True, **more)["o"]
    for x, then in zip(state, before, strict=True):
        if x is not None:
            x.copy_(then)
    for t in range(20, 40):
        for name, x in token.tokens.items():
            None if x is None else x.copy_(case.tokens[name][:, t : t + 1])
        graph.replay()
        torch.testing.assert_close(o, wanted["o"][:, t : t + 1], rtol=1e-4, atol=1e-5)
    left = in_order({f"state.{n}": x for n, x in state._asdict().items() if x is not None}, places)
    for name, x in left.items():
        torch.testing.assert_close(x, wanted[name], rtol=1e-4, atol=1e-5)
