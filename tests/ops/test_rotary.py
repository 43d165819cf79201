"""Rotary positions in PyTorch and in Triton (its interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import apply_rotary, apply_rotary_by, rotary_both

SHAPES = [(2, 7, 3, 16), (1, 5, 1, 10), (3, 33, 4, 24), (1, 0, 2, 8)]


def turns(batch, length, dim, dtype=torch.float32):
    """Any numbers: the op knows of no angle."""
    return [torch.randn(batch, length, dim, device=DEVICE).to(dtype) for _ in range(2)]


def result(impl, x, cos, sin, weight):
    x = x.clone().requires_grad_()
    y = apply_rotary(x, cos, sin, impl=impl)
    return y.detach(), torch.autograd.grad((y * weight.to(y.dtype)).sum(), x)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shared", ["nothing", "rows", "positions"])
def test_output_and_gradient_against_float64(shape, dtype, shared):
    batch, length, heads, dim = shape
    torch.manual_seed(0)
    x = torch.randn(batch, heads, length, dim, device=DEVICE, dtype=dtype).transpose(1, 2)  # another layout
    weight = torch.randn(shape, device=DEVICE).to(dtype)
    cos, sin = turns(1 if shared == "rows" else batch, 1 if shared == "positions" else length, dim, dtype)
    exact = result("torch", x.double(), cos.double(), sin.double(), weight.double())
    found = [result(impl, x, cos, sin, weight) for impl in ("torch", "triton")]
    for reference, plain, fast in zip(exact, *found, strict=True):
        if reference.numel():
            errors = [(y.double() - reference).abs().max() for y in (fast, plain)]
            assert fast.dtype == dtype and errors[0] <= 2 * errors[1] + 1e-6


def test_turns_of_another_dtype_and_a_gradient_that_is_expanded():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, device=DEVICE, requires_grad=True)
    cos, sin = turns(1, 5, 8, torch.float16)
    found = [torch.autograd.grad(apply_rotary(x, cos, sin, impl=impl).sum(), x)[0] for impl in ("torch", "triton")]
    torch.testing.assert_close(found[1], found[0])


def test_registered_as_torch_wants_it_and_compiles_to_one_graph():
    from lizard_ops.rotary.triton_op import turn

    x, (cos, sin) = torch.randn(2, 5, 3, 8, device=DEVICE, requires_grad=True), turns(1, 5, 8)
    torch.library.opcheck(turn, (x, cos, sin, False))

    def double(x):
        return 2 * apply_rotary(x, cos, sin, impl="triton")

    torch.compiler.reset()
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), double(x))
    wanted, found = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (double, compiled))
    torch.testing.assert_close(found, wanted)


def test_angles_that_train_get_their_gradients():
    x, (cos, sin) = torch.randn(1, 4, 2, 8, device=DEVICE), turns(1, 4, 8)
    cos.requires_grad_()
    assert torch.autograd.grad(apply_rotary(x, cos, sin).sum(), cos)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="gradients of cos and sin"):
        apply_rotary(x, cos, sin, impl="triton")


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("x", [(1, 4, 2, 7), (1, 4, 7), (1, 4, 7)]),
        ("x", [(4, 2, 8), (1, 4, 8), (1, 4, 8)]),
        ("cos", [(2, 4, 2, 8), (3, 4, 8), (2, 4, 8)]),
        ("sin", [(2, 4, 2, 8), (1, 4, 8), (1, 4, 4)]),
    ],
)
def test_bad_arguments_are_refused_by_name(name, shapes):
    with pytest.raises(ValueError, match=f"^{name}:"):
        apply_rotary(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 16), (1, 300, 10), (3, 0, 8)])
def test_keys_turned_by_steps_of_their_own(shape, dtype):
    """As far on as a million positions, where float32 angles are off by a tenth; by the exponential of each pair."""
    torch.manual_seed(0)
    half = shape[2] // 2
    x = torch.randn(shape[1], shape[0], shape[2], device=DEVICE, dtype=dtype).transpose(0, 1)
    steps = torch.randint(0, 2**20, shape[:2], device=DEVICE)
    frequencies = (10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)).to(DEVICE)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(frequencies), frequencies) ** steps[..., None]
    wanted = torch.cat([turned.real, turned.imag], -1)
    for impl in ("torch", "triton"):
        found = apply_rotary_by(x, steps, frequencies, impl=impl)
        assert found.dtype == dtype and found.shape == shape
        torch.testing.assert_close(found.double(), wanted, atol=3e-6 if dtype == torch.float32 else 3e-3, rtol=0)


def test_steps_of_their_own_have_gradients_and_are_registered():
    from lizard_ops.rotary.triton_op import turn_by_steps

    x = torch.randn(1, 4, 8, device=DEVICE, requires_grad=True)
    steps, frequencies = torch.arange(4, device=DEVICE)[None], torch.rand(4, device=DEVICE)
    apply_rotary_by(x, steps, frequencies).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # lengths stay
    torch.library.opcheck(
        turn_by_steps, (x.detach(), steps, frequencies), test_utils=("test_schema", "test_faketensor")
    )
    with pytest.raises(ValueError, match="impl: got 'triton'.*gradients"):
        apply_rotary_by(x, steps, frequencies, impl="triton")


@pytest.mark.parametrize(
    "name, x, steps, frequencies",
    [("x", (4, 7), (4,), (3,)), ("x", (1, 4, 7), (1, 4), (3,)), ("steps", (1, 4, 8), (2, 4), (4,)),
     ("frequencies", (1, 4, 8), (1, 4), (8,))],
)  # fmt: skip
def test_steps_that_do_not_fit_are_refused(name, x, steps, frequencies):
    with pytest.raises(ValueError, match=f"{name}: got"):
        apply_rotary_by(torch.zeros(x), torch.zeros(steps, dtype=torch.int64), torch.zeros(frequencies))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(2, 7, 3, 16), (3, 33, 9, 24), (1, 1, 32, 8), (1, 0, 2, 8)])
def test_queries_and_keys_at_once_are_the_same_bits(impl, shape):
    torch.manual_seed(0)
    batch, length, heads, dim = shape
    q = torch.randn(batch, heads, length, dim, device=DEVICE).transpose(1, 2)
    k = torch.randn(batch, length, 2, dim, device=DEVICE)
    cos, sin = turns(1, length, dim)
    weights = torch.randn(shape, device=DEVICE), torch.randn(k.shape, device=DEVICE)
    alone = [result(impl, x, cos, sin, w) for x, w in zip((q, k), weights, strict=True)]
    with torch.no_grad():
        quiet = rotary_both(q, k, cos, sin, impl=impl)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    both = rotary_both(*leaves, cos, sin, impl=impl)
    gradients = torch.autograd.grad([y for y in both], leaves, list(weights))
    for (y, d), found, still, gradient in zip(alone, both, quiet, gradients, strict=True):
        assert torch.equal(found, y) and torch.equal(still, y) and torch.equal(gradient, d)
    one = torch.autograd.grad(rotary_both(*leaves, cos, sin, impl=impl)[1], leaves[1], weights[1])[0]
    assert torch.equal(one, alone[1][1])  # where one of them has no gradient


def test_queries_and_keys_must_stand_together():
    cos, sin = turns(1, 5, 8)
    q, k = torch.randn(2, 5, 3, 8, device=DEVICE), torch.randn(1, 5, 3, 8, device=DEVICE)
    with pytest.raises(ValueError, match="k: got"):
        rotary_both(q, k, cos, sin)
    with pytest.raises(ValueError, match="q: got"):
        rotary_both(q[..., :7], q[..., :7], cos, sin)
