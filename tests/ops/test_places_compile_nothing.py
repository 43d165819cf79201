"""Layers differ in how many keys they keep: the kernels must not be compiled for each."""

from __future__ import annotations

import inspect

import pytest
import torch
from kernel_checks import DEVICE
from triton.runtime.interpreter import InterpretedFunction

from lizard_ops import chunk_hybrid_attn

B, T, HQ, HK, D, F = 1, 40, 4, 2, 16, 8
WINDOW, ANCHORS = 4, 1

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="what is compiled is read from launches in the interpreter")


@pytest.fixture
def launched(monkeypatch):
    """What each launch would be compiled for, in place of its run: (kernel, its constants)."""
    found = set()

    def note(kernel, *args, grid, warmup=False, **given):
        signature = inspect.signature(kernel.fn)
        named = {name: x for name, x in given.items() if name in signature.parameters}
        bound = signature.bind(*args, **named).arguments
        constant = {n for n, p in signature.parameters.items() if "constexpr" in str(p.annotation)}
        within = [f"{n} {i}" for n, x in bound.items() if isinstance(x, tuple) for i in x if "constexpr" in repr(i)]
        found.add((kernel.fn.__name__, *sorted(f"{n}={bound[n]}" for n in constant & set(bound)), *within))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    return found


@pytest.mark.parametrize("coverage", ("outside", "left"))
def test_other_places_take_the_same_kernels(launched, coverage):
    def launches(places):
        launched.clear()
        q, fq = torch.zeros(B, T, HQ, D, requires_grad=True), torch.zeros(B, T, HQ, F, requires_grad=True)
        k, v, fk = (torch.zeros(B, T, HK, n, requires_grad=True) for n in (D, D, F))
        call = {"window": WINDOW, "anchors": ANCHORS, "coverage": coverage, "impl": "triton", "kept_keys": places}
        call |= {"scores": torch.zeros(B, T, HK), "g": -torch.ones(B, T, HK)}
        chunk_hybrid_attn(q, k, v, fq, fk, **call)[0].sum().backward()
        with torch.no_grad():
            _, state = chunk_hybrid_attn(q, k, v, fq, fk, output_final_state=True, **call)
            chunk_hybrid_attn(q, k, v, fq, fk, initial_state=state, output_final_state=True, **call)
        return set(launched)

    first = launches([40, 1])
    assert {"displaced_kernel", "last_kernel", "output_kernel", "kept_key_kernel"} <= {name for name, *_ in first}
    assert launches([50, 33]) == first
