"""Gate and merge bias of a token in PyTorch and in Triton (its interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import gate_and_bias
from lizard_ops.gate import api, parts
from lizard_ops.gate.parts import gate_and_bias_in_parts

SHAPES = [(1, 1, 12, 1, 3), (3, 2, 576, 3, 9), (2, 0, 8, 1, 1), (0, 1, 8, 2, 2), (1, 1, 5000, 2, 2)]  # B, T, D, G, H
WRONG = [
    ({"x": torch.ones(2, 4)}, "x: got"),
    ({"x": torch.ones(1, 2, 4, dtype=torch.long)}, "x: got"),
    ({"gate_weight": torch.ones(2, 3)}, "gate_weight: got"),
    ({"gate_weight": torch.ones(2, 4).half()}, "gate_weight: got"),
    ({"gate_bias": torch.ones(3)}, "gate_bias: got"),
    ({"bias_weight": torch.ones(4)}, "bias_weight: got"),
    ({"bias_weight": torch.ones(3, 4).double()}, "bias_weight: got"),
    ({"bias": torch.ones(2)}, "bias: got"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"temperature": True}, "temperature: got True"),
    ({"impl": "triton", "x": torch.ones(1, 2, 4, requires_grad=True)}, "impl: got 'triton'.*gradients"),
    ({"impl": "triton", "x": torch.ones(1, 2, 4).double()}, "gate_weight: got"),
    ({"impl": "fast"}, "impl: got 'fast'"),
]


def drawn(batch, length, dim, gates, heads, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(batch, length, 2 * dim, device=DEVICE).to(dtype)[..., ::2]  # another layout
    sizes = ((gates, dim), (gates,), (heads, dim), (heads,))
    return x, *(torch.randn(*size, device=DEVICE) for size in sizes)


def exact(x, gate_weight, gate_bias, bias_weight, bias, temperature):
    z = torch.einsum("btd,hd->bth", x.double(), gate_weight.double()) + gate_bias.double()
    m = torch.einsum("btd,hd->bth", x.double(), bias_weight.double()) + (0 if bias is None else bias.double())
    return -torch.log1p((-z).exp()) / temperature, m


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("temperature", "biased"), [(1.0, True), (16.0, False)])
def test_output_against_float64(shape, dtype, temperature, biased):
    given = drawn(*shape, dtype)
    given = given if biased else (*given[:4], None)
    wanted = exact(*given, temperature)
    plain, fast = (gate_and_bias(*given, temperature=temperature, impl=impl) for impl in ("torch", "triton"))
    for ours, theirs, right in zip(fast, plain, wanted, strict=True):
        assert ours.shape == right.shape and ours.dtype == theirs.dtype == torch.float32
        if right.numel():
            errors = [(y.double() - right).abs().max() for y in (ours, theirs)]
            assert errors[0] <= 2 * errors[1] + 1e-6 * right.abs().max()


def test_gates_near_one_and_zero_keep_their_digits():
    logits = torch.tensor([-1e4, -90.0, -3.0, 0.0, 3.0, 12.0, 17.5, 60.0, 1e4], device=DEVICE)
    x, zeros = torch.zeros(1, 1, 4, device=DEVICE), torch.zeros(len(logits), 4, device=DEVICE)
    for impl in ("torch", "triton"):
        g, m = gate_and_bias(x, zeros, logits, zeros, logits, impl=impl)
        right = -torch.nn.functional.softplus(-logits.double())
        assert (g <= 0).all() and torch.equal(m[0, 0], logits)
        # a GPU's exponential takes its argument in units of log 2, rounded: 2^-24 of its size is a relative error
        rounded = 1e-6 + logits.double().abs().clamp(max=90) * 2**-24
        assert ((g[0, 0].double() - right).abs() <= rounded * right.abs() + 1e-38).all()


def test_gradients_are_those_of_the_formula():
    given = [t.double().requires_grad_() for t in drawn(2, 3, 5, 2, 3)]
    draw = [torch.randn(2, 3, n, dtype=torch.float64, device=DEVICE) for n in (2, 3)]
    found, wanted = (
        torch.autograd.grad(sum((y * d).sum() for y, d in zip(outputs, draw, strict=True)), given)
        for outputs in (gate_and_bias(*given, temperature=4.0), exact(*given, 4.0))
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_products_are_float32s_under_autocast():
    given = drawn(1, 2, 64, 2, 2)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = gate_and_bias(*given, impl="torch")
    assert all(map(torch.equal, inside, gate_and_bias(*given, impl="torch")))


PARTS = [(1, 70, 12, 1, 3), (2, 33, 1100, 8, 32), (2, 0, 8, 1, 1), (0, 1, 8, 2, 2)]


@pytest.mark.parametrize("shape", PARTS)
@pytest.mark.parametrize(("temperature", "biased"), [(1.0, True), (16.0, False)])
def test_products_in_parts_are_float32s(shape, temperature, biased):
    """Outputs, and the gradients of weights and biases, as near to float64 as float32's; that of x to the last bit of
    bfloat16."""
    given = list(drawn(*shape, torch.bfloat16))
    given = given if biased else [*given[:4], None]
    here = [None if t is None else t.detach().requires_grad_() for t in given]
    there = [None if t is None else t.detach().double().requires_grad_() for t in given]
    draw = [torch.randn(*shape[:2], n, device=DEVICE) for n in shape[3:]]

    def of(way, leaves):
        outputs = way(*leaves, temperature)
        total = sum((y * d.to(y.dtype)).sum() for y, d in zip(outputs, draw, strict=True))
        return [*outputs, *torch.autograd.grad(total, [t for t in leaves if t is not None])]

    plain = lambda x, *rest: gate_and_bias(x, *rest[:-1], temperature=rest[-1], impl="torch")  # noqa: E731
    found, simple, right = of(gate_and_bias_in_parts, here), of(plain, here), of(exact, there)
    for i, (ours, theirs, wanted) in enumerate(zip(found, simple, right, strict=True)):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), i
        if wanted.numel():
            errors = [(y.double() - wanted).abs().max() for y in (ours, theirs)]
            assert errors[0] <= 2 * errors[1] + 1e-6 * wanted.abs().max(), i


def test_parts_are_taken_on_a_gpu_of_bfloat16(monkeypatch):
    taken = []
    monkeypatch.setattr(parts, "gate_and_bias_in_parts", lambda *given: taken.append(given[0].dtype))
    monkeypatch.setattr(api, "choose_impl", lambda impl, x, beyond: "torch" if beyond else "triton")
    weights = [torch.ones(*size, device=DEVICE, requires_grad=True) for size in ((2, 4), (2,), (3, 4), (3,))]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        gate_and_bias(torch.ones(1, 2, 4, dtype=dtype, device=DEVICE), *weights)  # gradients are recorded
    assert taken == [torch.bfloat16]
    gate_and_bias(torch.ones(1, 2, 4, dtype=torch.bfloat16, device=DEVICE), *weights, impl="torch")
    assert len(taken) == 1


def test_gates_in_parts_keep_their_digits_near_one_and_zero():
    logits = torch.tensor([-1e4, -90.0, -3.0, 0.0, 3.0, 12.0, 17.5, 60.0, 1e4], device=DEVICE).requires_grad_()
    zeros = torch.zeros(len(logits), 4, device=DEVICE)
    g, m = gate_and_bias_in_parts(
        torch.zeros(1, 1, 4, device=DEVICE, dtype=torch.bfloat16), zeros, logits, zeros, logits.detach(), 1.0
    )
    (slope,) = torch.autograd.grad(g.sum(), logits)
    right = -torch.nn.functional.softplus(-logits.detach().double())
    assert (g <= 0).all() and torch.equal(m[0, 0], logits)
    rounded = 1e-6 + logits.detach().double().abs().clamp(max=90) * 2**-24
    assert ((g[0, 0].double() - right).abs() <= rounded * right.abs() + 1e-38).all()
    torch.testing.assert_close(slope.double(), (-logits.detach().double()).sigmoid(), rtol=2e-5, atol=1e-38)


def test_a_second_derivative_in_parts_is_the_formulas():
    given = drawn(1, 5, 8, 2, 3, torch.bfloat16)
    here = [t.detach().requires_grad_() for t in given]
    there = [t.detach().double().requires_grad_() for t in given]

    def curvature(way, leaves):
        outputs = way(*leaves, 2.0)
        first = torch.autograd.grad(sum(y.pow(3).sum() for y in outputs), leaves[1:4], create_graph=True)
        return torch.autograd.grad(sum(y.square().sum() for y in first), leaves[1:4])

    for ours, wanted in zip(curvature(gate_and_bias_in_parts, here), curvature(exact, there), strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_registered_as_torch_wants_it():
    from lizard_ops.gate.triton_op import both

    torch.library.opcheck(both, (*(t.contiguous() for t in drawn(2, 1, 8, 2, 4)), 1.0))


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_bad_arguments(changes, said):
    ones = {"gate_weight": (2, 4), "gate_bias": (2,), "bias_weight": (3, 4), "bias": (3,)}
    given = {"x": torch.ones(1, 2, 4)} | {name: torch.ones(*size) for name, size in ones.items()}
    with pytest.raises(ValueError, match=said):
        gate_and_bias(**given | changes)
