"""Gradients that come back through states by the kernels of kept keys, in the interpreter without a GPU."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
from kernel_checks import DEVICE
from op_cases import call, state_in
from op_checks import judge, with_gradients
from target_cases import in_segments, rows_of
from test_kept_state import in_order as in_order_of_all
from test_places_in_states import in_order as in_order_of_each
from test_triton_kept_states import ALL, EXP, HALF, LEFT, MERGE, SUM, make, smaller

pytest.importorskip("lizard_ops.hybrid_attn.triton.kept_prefill")

SMALL = {"window": 4, "anchors": 1, "Fp": 4, "G": 1}
gpu_alone = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes two seconds a case")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    smaller(monkeypatch, segment=16)
    if DEVICE == "cuda":
        return
    for module in ("hybrid_attn.triton.kept_bwd", "window_attn.triton.bwd_keys"):  # which must agree on blocks of keys
        module = importlib.import_module(f"lizard_ops.{module}")
        large = module.config_for
        monkeypatch.setattr(module, "config_for", lambda *x, large=large: large(*x)._replace(rows=16, columns=16))


def in_order(outputs, places):
    return in_order_of_each(outputs, places) if isinstance(places, tuple) else in_order_of_all(outputs)


def given_scores(run, scores):
    """``run`` of a case without scores, which no gradient goes through."""

    def step(case):
        case.tokens["scores"] = scores.to(case.tokens["q"].device)
        return run(case)

    return step


def check(case, cuts, dtype=torch.float32, **more):
    """Outputs, the state at the end and the gradients of both, by pieces, as one pass of the reference has them."""
    scores, places = case.tokens.pop("scores"), more["kept_keys"]

    def pieces(c):
        return in_order(in_segments(c, cuts, functools.partial(piece, **more)), places)

    def whole(c):
        return in_order(call(c, "naive", **more), places)

    found = with_gradients(given_scores(pieces, scores), case.cast(dtype, DEVICE))
    judge(found, case.cast(dtype), dtype, given_scores(whole, scores))


def piece(case, state, **more):
    return call(case, "chunk", state, impl="triton", **more)


@pytest.mark.parametrize(
    "fixed, length, cuts, places, delay, dtype",
    [
        (MERGE | {"gate": "key", "weight": "head"}, 34, (13,), 5, 1, torch.float32),
        (SUM | LEFT | EXP | {"gate": "query", "G": 2, "normalize": True}, 30, (11,), 4, 0, torch.float32),
        *(
            pytest.param(*values, marks=gpu_alone)
            for values in (
                (MERGE | {"gate": "key", "Hk": 2}, 37, (12,), (6, 2), 1, torch.float32),
                (MERGE | {"gate": "key", "G": 2}, 48, (14, 40), 5, 1, torch.float32),
                (MERGE | {"gate": "key", "G": 4}, 300, (90, 170), 20, 1, HALF),
                (SUM | {"gate": "query", "B": 2, "Hk": 2, "G": 2}, 44, (19,), 3, 0, torch.float32),
                (SUM | {"gate": "token", "weight": "token", "G": 2}, 260, (19, 20), 33, 2, HALF),
                (MERGE | EXP | {"gate": "key"}, 48, (9, 33), 17, 2, torch.float32),
                (MERGE | LEFT | {"gate": "token", "weight": "token", "G": 2}, 48, (13,), 5, 1, torch.float32),
                (MERGE | LEFT | EXP | {"gate": "query", "window": 1, "anchors": 3}, 44, (3, 30), 4, 0, torch.float32),
                (SUM | ALL | {"gate": "key", "normalize": True, "sinks": True}, 44, (13,), 20, 1, torch.float32),
                (SUM | {"gate": None, "normalize": True}, 44, (13,), 5, 1, torch.float32),
                (MERGE | ALL | EXP | {"gate": "key"}, 44, (9,), 4, 2, torch.float32),
                (MERGE | {"merge_mass": "absolute", "gate": "key", "weight": "head"}, 44, (1, 2, 20), 4, 0, HALF),
                (MERGE | {"gate": "key", "Hk": 3}, 40, (20,), (6, 0, 2), 1, torch.float32),
            )
        ),
    ],
)  # fmt: skip
def test_gradients_come_back_through_pieces(fixed, length, cuts, places, delay, dtype):
    """Of the outputs of all pieces and of every field that the last one leaves."""
    check(make(length, **SMALL | fixed), cuts, dtype, kept_keys=places, score_delay=delay)


def test_resets_before_and_after_a_state():
    """They leave nothing of the keys before them, in the sums and where those keys expire; the last one not of all."""
    case = make(23, gate="key", **SMALL | SUM | {"normalize": True})
    case.tokens["g"][:, [3, 12, 16]] = -torch.inf
    case.tokens["g"][:, [6, 14]] = -30.0
    check(case, (10,), kept_keys=3, score_delay=1)


@pytest.mark.parametrize("kind", ["packed", pytest.param("padded", marks=gpu_alone)])
def test_gradients_of_states_are_those_of_pytorch(kind):
    """Of every field of texts that have seen nothing, some and all of another, of rows of every kind; twice the same
    bits."""
    case = make(18, B=2, gate="key", **SMALL | MERGE).cast(torch.float32, DEVICE)
    more = {"kept_keys": 3, "score_delay": 1}
    rows, given = rows_of(case, kind)
    first = case.part(slice(0, 1), slice(None)).map(lambda n, x: -x if n == "k" else x)  # no score twice: maxima tie
    seen = (18, 0, 7)[: 3 if kind == "packed" else 2]
    with torch.no_grad():
        past = [call(first.part(slice(None), slice(0, n)), "chunk", impl="torch", **more) for n in seen]
    state = {n: torch.cat([x[n] for x in past]) for n in past[0] if "state." in n}
    names = [n for n, x in state.items() if x.is_floating_point() and "scores" not in n and "log_scale" not in n]

    def gradients(impl):
        leaves = {n: state[n].clone().requires_grad_() for n in names}
        tokens = {n: x.clone().requires_grad_() for n, x in rows.tokens.items() if x is not None and n != "scores"}
        there = rows.map(lambda n, x: tokens.get(n, x))
        out = in_order(call(there, "chunk", state_in(state | leaves), impl=impl, **more, **given), 3)
        ends = [x for n, x in out.items() if x.requires_grad and "log_scale" not in n]
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in ends]
        return torch.autograd.grad(ends, [*leaves.values(), *tokens.values()], weights)

    found, wanted = gradients("triton"), gradients("torch")
    again = gradients("triton") if DEVICE == "cuda" else found
    for name, x, y, z in zip([*names, *rows.tokens], found, again, wanted, strict=False):
        assert torch.equal(x, y), name
        torch.testing.assert_close(x, z, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: name + m)


def test_no_token_hands_the_gradient_on():
    case = make(16, gate="key", **SMALL | MERGE).cast(torch.float32, DEVICE)
    more = {"kept_keys": 3, "impl": "triton"}
    with torch.no_grad():
        state = state_in(call(case, "chunk", **more))
    leaves = {
        n: x.requires_grad_() for n, x in state._asdict().items() if n in ("s", "z", "ring_k", "kept_v", "kept_g")
    }
    case.tokens["q"].requires_grad_()
    after = call(case.part(slice(None), slice(0, 0)), "chunk", state, **more)
    ends = [after[f"state.{n}"] for n in leaves]
    for grad in torch.autograd.grad(sum(x.sum() for x in ends), list(leaves.values())):
        assert (grad == 1.0).all()


def test_operators_are_well_formed(monkeypatch):
    """As they are called, with a state and without."""
    operators, calls = importlib.import_module("lizard_ops.hybrid_attn.triton.kept_prefill"), []
    for user, name in (("kept_state", "kept_prefill"), ("kept_prefill", "kept_prefill_backward")):
        operator = getattr(operators, name)
        module = importlib.import_module(f"lizard_ops.hybrid_attn.triton.{user}")

        def record(operator=operator, **given):
            calls.append((operator, given))
            return operator(**given)

        monkeypatch.setattr(module, name, record)
    case = make(9, gate="key", **SMALL | MERGE).cast(torch.float32, DEVICE)
    case.tokens["q"].requires_grad_()
    out = in_segments(case, [5], functools.partial(piece, kept_keys=2))
    (out["o"].sum() + out["state.s"].sum()).backward()
    assert len(calls) == 4
    for operator, given in calls:
        given = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        torch.library.opcheck(operator, (), given, test_utils=("test_schema", "test_faketensor"))


def test_second_derivatives_are_refused_by_name():
    case = make(5, gate="key", **SMALL | MERGE).cast(torch.float32, DEVICE)
    case.tokens["v"].requires_grad_()
    o = call(case, "chunk", impl="triton", kept_keys=2)["o"]
    (grad,) = torch.autograd.grad(o.square().sum(), case.tokens["v"], create_graph=True)
    with pytest.raises(ValueError, match='got "triton" for a second derivative of chunk_hybrid_attn'):
        torch.autograd.grad(grad.sum(), case.tokens["v"])
