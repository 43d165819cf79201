"""Second derivatives of the library's own gradients: those of the formula, or refused by name, never left out."""

import pytest
import torch
from torch import nn

from lizard_models.distill.adapters import adapted_linear
from lizard_models.distill.frozen_head import frozen_head_loss
from lizard_models.distill.graphed import _HandOut
from lizard_models.model.layer_loss import layer_loss, output_error


def curvature(function, x):
    """d/dx of the squared gradient, with a term that is no function of the gradient, and the gradient."""
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    return torch.autograd.grad(first.square().sum() + leaf.pow(3).sum(), leaf)[0], first.detach()


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


WEIGHT = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)


def updated(x, down, up):
    return adapted_linear(x, WEIGHT.to(x), None, down, up, 0.7)


@pytest.mark.parametrize("which", range(3), ids=["x", "down", "up"])
def test_an_adapted_product_has_the_curvature_of_its_formula(which):
    inputs = leaves((2, 3, 4), (2, 4), (5, 2))

    def formula(x, down, up):
        return x @ WEIGHT.mT + 0.7 * (x @ down.mT) @ up.mT

    def cubes(update, x):
        return update(*inputs[:which], x, *inputs[which + 1 :]).pow(3).sum()

    wanted = curvature(lambda x: cubes(formula, x), inputs[which])
    found = curvature(lambda x: cubes(updated, x), inputs[which])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_crossed_derivatives_of_an_adapted_product():
    inputs = [t.requires_grad_() for t in leaves((3, 4), (2, 4), (5, 2))]
    assert torch.autograd.gradgradcheck(updated, inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, where half precision sums in float32")
def test_an_adapted_product_in_half_precision_on_a_gpu():
    """float32 factors beside bfloat16 tokens, as stage 2 has them."""
    w, x, down, up = (t.cuda() for t in leaves((64, 32), (40, 32), (8, 32), (64, 8)))
    exact = curvature(lambda a: (x @ w.mT + 0.7 * (x @ a.mT) @ up.mT).pow(3).sum(), down)
    half = lambda t: t.bfloat16()  # noqa: E731
    found = curvature(
        lambda a: adapted_linear(half(x), half(w), None, a, up.float(), 0.7).float().pow(3).sum(), down.float()
    )
    for one, wanted in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - wanted).norm() < 0.02 * wanted.norm()


STUDENT, TARGET = leaves((1, 3, 2, 4), (1, 3, 2, 4))
HEAD = nn.Linear(4, 7, dtype=torch.float64).requires_grad_(False)
REFUSED = {
    "output_error": lambda x: output_error(x, TARGET, "relative"),
    'the losses of mode "distill"': lambda x: layer_loss(lambda: x.sin() * STUDENT, TARGET, "mse", None, [x])[0],
    "frozen_head_loss": lambda x: frozen_head_loss(
        x.flatten(0, 2), HEAD, torch.arange(6), None, None, cross_entropy_weight=1.0, kl_weight=0.0, chunk=4
    ),
    "a loss from a CUDA graph": lambda x: _HandOut.apply(x.detach().sum(), [torch.ones_like(x)], x),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("times", [1, 3], ids=["alone", "of a function"])
def test_what_has_one_derivative_refuses_a_second_by_name(name, times):
    """Also where the incoming gradient is a constant, and another term has a second derivative."""
    with pytest.raises(ValueError, match=f"{name}: got a second derivative"):
        curvature(lambda x: REFUSED[name](x) ** times, STUDENT)


@pytest.mark.parametrize("kind", ["relative", "mse"])
def test_the_first_derivative_under_create_graph_is_the_same(kind):
    real = torch.ones(1, 3, dtype=torch.bool)
    leaf = STUDENT.clone().requires_grad_()
    wanted = torch.autograd.grad(output_error(leaf, TARGET, kind, real), leaf)[0]
    for create in (False, True):
        (found,) = torch.autograd.grad(output_error(leaf, TARGET, kind), leaf, create_graph=create)
        torch.testing.assert_close(found, wanted)
        assert found.requires_grad is create
    assert curvature(lambda x: output_error(x, TARGET, kind, real), STUDENT)[0].isfinite().all()
