"""The shortened interpreter of tests/quick_interpreter.py gives what the interpreter gives as it comes."""

from __future__ import annotations

import pytest
import quick_interpreter
import torch
from kernel_checks import DEVICE, with_gradients

from lizard_ops import chunk_gated_attn, key_expiry, window_attn

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="kernels are not interpreted here")


def gated(x):
    return {"o": chunk_gated_attn(x["q"], x["k"], x["v"], x["g"], impl="triton")[0]}


def window(x):
    return {"o": window_attn(x["q"], x["k"], x["v"], 5, impl="triton")[0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", [gated, window])
def test_every_bit_is_that_of_the_whole_interpreter(op, dtype, monkeypatch):
    pytest.importorskip("triton")
    if not quick_interpreter.REPLACED:
        pytest.skip("this release of Triton is interpreted as it comes")
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(1, 19, 1, 16, generator=generator) for name in ("q", "k", "v")}
    x |= {"q": x["q"].abs(), "k": x["k"].abs(), "g": -torch.rand(1, 19, 1, generator=generator)}
    quick = with_gradients(op, x, dtype)
    for owner, name, value in quick_interpreter.REPLACED:
        monkeypatch.setattr(owner, name, value)
    whole = with_gradients(op, x, dtype)
    assert quick.keys() == whole.keys() and len(quick) > 3
    for name, expected in whole.items():
        assert torch.equal(quick[name], expected), name


def test_keys_expire_where_the_whole_interpreter_lets_them(monkeypatch):
    """Their kernels sort, by exclusive ors of integers."""
    pytest.importorskip("triton")
    if not quick_interpreter.REPLACED:
        pytest.skip("this release of Triton is interpreted as it comes")
    scores = torch.randn(1, 37, 2, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # some are equal
    quick = key_expiry(scores, 8, 2, 5, impl="triton")
    for owner, name, value in quick_interpreter.REPLACED:
        monkeypatch.setattr(owner, name, value)
    assert torch.equal(quick.expiry, key_expiry(scores, 8, 2, 5, impl="triton").expiry)
