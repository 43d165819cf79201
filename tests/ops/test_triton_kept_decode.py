"""The decode kernel with kept keys against the step in PyTorch, in the interpreter without a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_checks import DEVICE, check_fields
from op_cases import call, cases, state_in
from op_checks import one_of
from test_kept_state import in_order, scored

decode = pytest.importorskip("lizard_ops.hybrid_attn.triton.decode")

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter gets bfloat16 wrong
MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "merge_mass": "relative"}
ABSOLUTE = MERGE | {"merge_mass": "absolute"}
SUM = {"mix": "sum", "coverage": "outside", "normalize": False, "feature_map": "identity"}
EXP = {"feature_map": "exp"}
ALL, LEFT = {"coverage": "all"}, {"coverage": "left"}
SIZES = {"B": 1, "Hk": 1, "G": 2, "K": 8, "V": 5, "Fp": 4, "window": 4, "anchors": 1, "sink_form": "exp", "decay": 0.5}


def make(length, seed=0, **fixed):
    return scored(one_of(cases("hybrid", **(SIZES | {"T": length, "sinks": False, "weight": None} | fixed))), seed)


def steps(case, impl, state=None, inplace=False, **more):
    """One token after the other: the outputs of all, and the fields of the state after the last."""
    if state is None:
        empty = case.part(slice(None), slice(0, 0))
        state = state_in(call(empty, "recurrent", impl="torch", **more))
    outputs = []
    for t in range(case.length):
        now = case.part(slice(None), slice(t, t + 1))
        found = call(now, "recurrent", state, impl=impl, inplace=inplace, **more)
        outputs.append(found.pop("o"))
        state = state_in(found)
    return {"o": torch.cat(outputs, 1), **found}


def agree(case, dtype=torch.float32, inplace=True, **more):
    """Places by places: the kernel overwrites the one that PyTorch does."""
    with torch.no_grad():
        exact = steps(case.cast(torch.float64, DEVICE), "torch", **more)
        rounded = case.cast(dtype, DEVICE)
        plain, found = steps(rounded, "torch", **more), steps(rounded, "triton", inplace=inplace, **more)
    check_fields(found, plain, exact, dtype)
    return found


def agree_on(fixed, places, delay, dtype):
    """From nothing to long past full, or with places that stay empty; with ties and infinities among the scores."""
    more = {"softcap": fixed["softcap"]} if "softcap" in fixed else {}
    case = make(18, **{name: x for name, x in fixed.items() if name != "softcap"})
    agree(case, dtype, kept_keys=places, score_delay=delay, **more)


@pytest.mark.parametrize(
    "fixed, places, delay, dtype",
    [
        (MERGE | {"gate": "key", "weight": "head", "B": 2, "Hk": 2}, 3, 0, torch.float32),
        (ABSOLUTE | {"gate": "token", "sinks": True, "weight": "token", "Hk": 2}, 20, 2, torch.float32),
        (MERGE | EXP | {"gate": "query", "anchors": 0, "G": 3}, 3, 2, torch.float32),
        (SUM | {"gate": "query", "weight": "token", "Hk": 2, "G": 1}, 1, 1, torch.float32),
        (SUM | EXP | {"gate": None, "normalize": True, "window": 1, "anchors": 3}, 4, 0, torch.float32),
        (SUM | ALL | {"gate": "key", "normalize": True, "sinks": True}, 3, 2, torch.float32),
        (MERGE | ALL | EXP | {"gate": "token"}, 33, 0, torch.float32),
        (MERGE | LEFT | {"gate": "key", "weight": "head", "B": 2, "Hk": 2}, 3, 0, torch.float32),
        (SUM | LEFT | EXP | {"gate": "query", "normalize": True, "anchors": 0}, 3, 2, torch.float32),
        (MERGE | {"gate": "key", "K": 16, "V": 16, "softcap": 1.5}, 5, 3, HALF),
    ],
)
def test_steps_are_those_of_pytorch(fixed, places, delay, dtype):
    agree_on(fixed, places, delay, dtype)


@pytest.mark.parametrize("gate, places", [("key", 2), ("query", 4)])
def test_resets_and_strong_decays(gate, places):
    """Keys of before a reset are nothing in the sums when they expire, whenever that is; places they keep."""
    case = make(14, **MERGE | {"gate": gate, "G": 2, "window": 2})
    kinds = torch.tensor([0.0, -1e-8, -0.3, -0.5, -60.0, -torch.inf], dtype=torch.float64)
    order = torch.tensor([2, 1, 5, 0, 2, 2, 4, 2, 0, 2, 5, 5, 2, 0])
    case.tokens["g"] = kinds[order].view(1, -1, 1).expand_as(case.tokens["g"]).clone()
    agree(case, kept_keys=places)


@torch.no_grad()
def test_states_of_the_chunk_form_go_on_in_place_and_twice_the_same():
    """Places in an order of their own, tensors where they were, and every bit."""
    case = make(15, Hk=2, **MERGE | {"gate": "key"}).cast(torch.float32, DEVICE)
    more = {"kept_keys": 4, "score_delay": 1}
    past, rest = (case.part(slice(None), slice(a, b)) for a, b in ((0, 11), (11, 15)))
    state = state_in(call(past, "chunk", impl="torch", **more))
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    moved = {n: x[:, order] for n, x in state._asdict().items() if n.startswith("kept_")}
    state = state._replace(**moved)
    wanted = in_order(steps(rest, "torch", state, **more))
    ends = []
    for _ in range(2):
        own = state._replace(**{n: x.clone() for n, x in state._asdict().items() if x is not None})
        addresses = [None if x is None else x.data_ptr() for x in own]
        found = steps(rest, "triton", own, inplace=True, **more)
        assert [None if x is None else x.data_ptr() for x in own] == addresses
        assert all(torch.equal(found[f"state.{n}"], x) for n, x in own._asdict().items() if x is not None)
        ends.append({name: x.clone() for name, x in found.items()})
    assert all(torch.equal(x, ends[1][name]) for name, x in ends[0].items())
    for name, x in in_order(ends[0]).items():
        torch.testing.assert_close(x.cpu(), wanted[name].cpu(), rtol=2e-5, atol=2e-6)


def one_step(dtype=torch.float32, **fixed):
    """(the inputs of a step, what it takes beside them, the state before it)."""
    case = make(9, **MERGE | {"gate": "key", "K": 8, "V": 8} | fixed).cast(dtype, DEVICE)
    more = {"kept_keys": 2, "score_delay": 1}
    with torch.no_grad():
        state = state_in(call(case.part(slice(None), slice(0, 8)), "chunk", impl="torch", **more))
    return case.part(slice(None), slice(8, 9)), more, state


@torch.no_grad()
def test_copies_leave_the_state_alone_whatever_its_alignment():
    """Rows that begin anywhere, too."""
    case, more, state = one_step()
    odd = {}
    for name, x in state._asdict().items():
        if x is not None and x.is_floating_point():
            odd[name] = torch.zeros(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(x.shape).copy_(x)
    odd = state._replace(**odd)
    before = [None if x is None else x.clone() for x in odd]
    plain = call(case, "recurrent", state, impl="triton", **more)
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, odd, strict=True))
    found = call(case, "recurrent", odd, impl="triton", inplace=True, **more)
    assert all(torch.equal(x, found[name]) for name, x in plain.items())


def test_operator_is_well_formed():
    case, _, state = one_step()
    x = case.tokens
    inputs = (x["q"], x["k"], x["v"], x["fq"], x["fk"], x["g"], None, None, *state)
    tail = (4, 1, True, True, True, "softmax", True, 0.3, 1.0, None, x["scores"].float())
    torch.library.opcheck(decode.hybrid_decode, (*inputs, *tail), test_utils=("test_schema", "test_faketensor"))


def test_auto_takes_the_kernel_on_a_gpu(monkeypatch):
    """But for a gate per channel, which PyTorch has."""
    seen = []
    api = importlib.import_module("lizard_ops.hybrid_attn.api")
    monkeypatch.setattr(api, "choose_impl", lambda impl, like, beyond: seen.append(beyond) or "torch")
    for fixed in ({}, {"gate": "channel"}):
        case, more, state = one_step(**fixed)
        seen.clear()
        with torch.no_grad():
            call(case, "recurrent", state, **more)
        assert seen == ([None] if not fixed else ["a gate per channel with kept keys"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["kept_k", "kept_v", "kept_fk"])
def test_kept_keys_of_another_dtype_than_their_ring_are_refused(name):
    case, more, state = one_step()
    with pytest.raises(ValueError, match=f"initial_state.{name}: got .* the dtype of ring_{name[5:]}"):
        call(case, "recurrent", state._replace(**{name: getattr(state, name).half()}), impl="triton", **more)
