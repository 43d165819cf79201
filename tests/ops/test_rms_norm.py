"""Root-mean-square norms in PyTorch and in Triton (its interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import rms_norm

SHAPES = [(3, 5), (2, 7, 3, 16), (1, 576), (2, 0, 8), (9,)]
WRONG = [
    ({"x": torch.ones(2, 4).double()}, "x: got"),
    ({"x": torch.ones(())}, "x: got"),
    ({"weight": torch.ones(3)}, "weight: got"),
    ({"weight": torch.ones(4).half()}, "weight: got"),
    ({"eps": 0.0}, "eps: got 0.0"),
    ({"eps": 1}, "eps: got 1"),
    ({"unit_offset": 1}, "unit_offset: got 1"),
    ({"impl": "triton", "x": torch.ones(2, 4, requires_grad=True)}, "impl: got 'triton'.*gradients"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_output_against_float64(shape, dtype, unit_offset):
    torch.manual_seed(0)
    x = 3 * torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE).to(dtype)[..., ::2]  # another layout
    weight = torch.randn(shape[-1], device=DEVICE).to(dtype)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 0.02).sqrt()
    exact = exact * (weight.double() + unit_offset)
    plain, fast = (rms_norm(x, weight, 0.02, unit_offset=unit_offset, impl=impl) for impl in ("torch", "triton"))
    assert fast.shape == x.shape and fast.dtype == dtype
    if x.numel():
        errors = [(y.double() - exact).abs().max() for y in (fast, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-6


def test_gradients_are_those_of_the_formula():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    exact = torch.nn.functional.rms_norm(x, (5,), weight, 0.1)
    for found, wanted in zip(
        torch.autograd.grad(rms_norm(x, weight, 0.1).sum(), (x, weight)),
        torch.autograd.grad(exact.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_registered_as_torch_wants_it():
    from lizard_ops.norm.triton_op import norm

    torch.library.opcheck(norm, (torch.randn(2, 3, 8, device=DEVICE), torch.randn(8, device=DEVICE), 1e-5, False))


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_bad_arguments(changes, said):
    given = {"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": 1e-5} | changes
    with pytest.raises(ValueError, match=said):
        rms_norm(**given)
