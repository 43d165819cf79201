"""Kernels have first derivatives: a second one is refused by name, or right where the op is its own gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import apply_rotary, chunk_gated_attn, chunk_hybrid_attn, project_heads, window_attn


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = {"q": torch.randn(1, 5, 2, 4), "k": torch.randn(1, 5, 1, 4), "v": torch.randn(1, 5, 1, 4)}
    x |= {"fq": torch.randn(1, 5, 2, 3), "fk": torch.randn(1, 5, 1, 3), "weight": torch.randn(1, 4, 3)}
    x |= {"g": -torch.rand(1, 5, 1), "channels": -torch.rand(1, 5, 1, 6)}
    return {name: t.to(DEVICE).requires_grad_() for name, t in x.items()}


def hybrid(x, gate):
    return chunk_hybrid_attn(
        x["q"], x["k"], x["v"], x["fq"], x["fk"], x[gate], 3, feature_map="softmax", impl="triton"
    )[0]


OPS = {
    "window_attn": (lambda x: window_attn(x["q"], x["k"], x["v"], 3, impl="triton")[0], "v"),
    "chunk_gated_attn": (lambda x: chunk_gated_attn(x["q"].exp(), x["k"].exp(), x["v"], x["g"], impl="triton")[0], "v"),
    "chunk_hybrid_attn": (lambda x: hybrid(x, "g"), "fq"),
    "chunk_gated_attn of channels": (lambda x: hybrid(x, "channels"), "fq"),
    "project_heads": (lambda x: project_heads(x["q"], x["weight"], impl="triton")[1], "weight"),
    "project_heads again": (lambda x: project_heads(x["q"], x["weight"], reuse_gradient=True, impl="triton")[1], "q"),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("linear", [True, False], ids=["sum", "square"])
def test_a_second_derivative_is_refused_by_name(name, linear):
    """Of a sum too, whose gradient with respect to the output does not depend on anything."""
    op, of = OPS[name]
    x = tensors()
    y = op(x)
    first = torch.autograd.grad(y.sum() if linear else y.square().sum(), x[of], create_graph=True)[0]
    assert first.requires_grad
    with pytest.raises(ValueError, match=f'impl: got "triton" for a second derivative of {name.split()[0]}'):
        first.square().sum().backward()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_rotary_has_derivatives_of_any_order(impl):
    x = tensors()["q"]
    cos, sin = torch.randn(2, 1, 5, 4, device=DEVICE)
    found = []
    for way in ("torch", impl):
        first = torch.autograd.grad(apply_rotary(x, cos, sin, impl=way).pow(3).sum(), x, create_graph=True)[0]
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[1], found[0])
