"""SiLU times product in PyTorch and in Triton (its interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor

from lizard_ops import silu_product

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
WRONG = [
    ({"gate": torch.ones(2, 4).double()}, "gate: got"),
    ({"gate": torch.ones(())}, "gate: got"),
    ({"up": torch.ones(4)}, "up: got"),
    ({"up": torch.ones(2, 4).half()}, "up: got"),
]


def halves(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    both = (4 * torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE)).to(dtype)
    return both[..., : shape[-1]], both[..., shape[-1] :]


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 16), (1, 1, 1536), (2, 0, 8), (9,), (3, 0), (2, 2500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["halves", "apart", "transposed"])
def test_output_against_float64(shape, dtype, layout):
    gate, up = halves(shape, dtype)
    if layout == "apart":
        gate, up = gate.contiguous(), up.contiguous()
    if layout == "transposed":
        gate, up = (x.transpose(0, -1).contiguous().transpose(0, -1) for x in (gate, up))
    exact = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    plain, fast = (silu_product(gate, up, impl=impl) for impl in ("torch", "triton"))
    assert fast.shape == gate.shape and fast.dtype == dtype
    if fast.numel():
        errors = [(y.double() - exact).abs().max() for y in (fast, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-6


def test_extremes():
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan, -1e4, 1e4, -0.0, 88.0, -90.0], device=DEVICE)
    up = torch.full_like(gate, 2.0)
    fast, plain = (silu_product(gate, up, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(fast, plain, equal_nan=True, rtol=1e-6, atol=1e-30)


def test_gradients_are_those_of_the_formula():
    gate, up = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    found = torch.autograd.grad(silu_product(gate, up).sum(), (gate, up))
    share = gate.sigmoid()
    wanted = (up * share * (1 + gate * (1 - share)), gate * share)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 16), (2, 0, 8), (9,), (2, 2500)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["halves", "transposed"])
def test_gradients_of_the_kernel_against_float64(shape, dtype, layout):
    gate, up = halves(shape, dtype)
    draw = torch.randn(shape, device=DEVICE).to(dtype)
    if layout == "transposed":
        gate, up, draw = (x.transpose(0, -1).contiguous().transpose(0, -1) for x in (gate, up, draw))

    def gradients(impl, of=dtype):
        leaves = [x.detach().to(of).requires_grad_() for x in (gate, up)]
        y = leaves[0] * leaves[0].sigmoid() * leaves[1] if impl is None else silu_product(*leaves, impl=impl)
        return torch.autograd.grad(y, leaves, draw.to(of))

    exact, plain, fast = gradients(None, torch.float64), gradients("torch"), gradients("triton")
    for a, b, wanted in zip(fast, plain, exact, strict=True):
        assert a.dtype == dtype and a.shape == wanted.shape
        if wanted.numel():
            errors = [(g.double() - wanted).norm() for g in (a, b)]
            assert errors[0] <= 2 * errors[1] + 1e-6 * wanted.norm()


def test_one_gradient_alone_and_no_second_derivative():
    gate, up = (x.contiguous() for x in halves((2, 8), torch.float32))
    (found,) = torch.autograd.grad(silu_product(gate, up.requires_grad_(), impl="triton").sum(), up, create_graph=True)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate))
    y = silu_product(gate.requires_grad_(), up, impl="triton")
    (found,) = torch.autograd.grad(y.sum(), gate, create_graph=True)
    with pytest.raises(ValueError, match='impl: got "triton" for a second derivative of silu_product'):
        found.sum().backward()


def test_registered_as_torch_wants_it():
    from lizard_ops.mlp.triton_op import product, product_backward

    gate, up = halves((2, 3, 8), torch.float32)
    torch.library.opcheck(product, (gate, up))
    torch.library.opcheck(product, (gate.detach().requires_grad_(), up.detach().requires_grad_()))
    torch.library.opcheck(product_backward, (gate, up, up.flip(0)))


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_bad_arguments(changes, said):
    given = {"gate": torch.ones(2, 4), "up": torch.ones(2, 4)} | changes
    with pytest.raises(ValueError, match=said):
        silu_product(**given)
