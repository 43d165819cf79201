"""SiLU times product in PyTorch and in Triton (its interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE
from torch import Tensor

from lizard_ops import silu_product

WRONG = [
    ({"gate": torch.ones(2, 4).double()}, "gate: got"),
    ({"gate": torch.ones(())}, "gate: got"),
    ({"up": torch.ones(4)}, "up: got"),
    ({"up": torch.ones(2, 4).half()}, "up: got"),
    ({"impl": "triton", "up": torch.ones(2, 4, requires_grad=True)}, "impl: got 'triton'.*gradients"),
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


def test_registered_as_torch_wants_it():
    from lizard_ops.mlp.triton_op import product

    torch.library.opcheck(product, halves((2, 3, 8), torch.float32))


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_bad_arguments(changes, said):
    given = {"gate": torch.ones(2, 4), "up": torch.ones(2, 4)} | changes
    with pytest.raises(ValueError, match=said):
        silu_product(**given)
