"""Gate and merge bias of a token in PyTorch and in Triton (its interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import gate_and_bias

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


def test_registered_as_torch_wants_it():
    from lizard_ops.gate.triton_op import both

    torch.library.opcheck(both, (*(t.contiguous() for t in drawn(2, 1, 8, 2, 4)), 1.0))


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_bad_arguments(changes, said):
    ones = {"gate_weight": (2, 4), "gate_bias": (2,), "bias_weight": (3, 4), "bias": (3,)}
    given = {"x": torch.ones(1, 2, 4)} | {name: torch.ones(*size) for name, size in ones.items()}
    with pytest.raises(ValueError, match=said):
        gate_and_bias(**given | changes)
