"""The kernels where heads keep different numbers of keys against the reference, in the interpreter without a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_checks import DEVICE, worst_excess
from op_cases import call, cases
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
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        if wanted.dtype == torch.int64 or "scores" in name:
            assert torch.equal(found[name].double(), wanted.double()), name
        else:
            error = worst_excess(found[name], plain[name], wanted, torch.float32)
            assert error <= 1, f"{name}: {error:.3g} times the error that is allowed"


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


def test_gradients_without_a_state():
    case, more = make(24, **MERGE | {"gate": "key", "Hk": 2}), {"kept_keys": (6, 1), "final": False}
    scores = case.tokens.pop("scores")

    def of(form, dtype, **given):
        def step(c):
            c.tokens["scores"] = scores.to(DEVICE)
            return call(c, form, **more, **given)

        return with_gradients(step, case.cast(dtype, DEVICE))

    compare(of("chunk", torch.float32, impl="triton"), of("naive", torch.float32), of("naive", torch.float64))
