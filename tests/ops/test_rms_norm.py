"""Root-mean-square norms in PyTorch and in Triton (its interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import add_rms_norm, rms_norm

SHAPES = [(3, 5), (2, 7, 3, 16), (1, 576), (2, 0, 8), (9,)]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
WRONG = [
    ({"x": torch.ones(2, 4).double()}, "x: got"),
    ({"x": torch.ones(())}, "x: got"),
    ({"weight": torch.ones(3)}, "weight: got"),
    ({"weight": torch.ones(4).half()}, "weight: got"),
    ({"eps": 0.0}, "eps: got 0.0"),
    ({"eps": 1}, "eps: got 1"),
    ({"unit_offset": 1}, "unit_offset: got 1"),
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


@pytest.mark.parametrize("rows", [1, 3])
def test_heads_of_one_product_are_read_where_they_lie(rows, monkeypatch):
    joined = torch.randn(rows, 5, 6 * 8, device=DEVICE)
    q = joined[:, :, : 4 * 8].unflatten(-1, (4, 8))
    weight, copied = torch.randn(8, device=DEVICE), q.contiguous()
    wanted = rms_norm(copied, weight, 0.02, impl="triton")
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: x if x.is_contiguous() else pytest.fail("copied"))
    assert torch.equal(rms_norm(q, weight, 0.02, impl="triton"), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_sum_and_its_norm_have_the_bits_of_both(shape, dtype, unit_offset):
    torch.manual_seed(1)
    x, residual = (3 * torch.randn(2, *shape, device=DEVICE).to(dtype)).unbind()
    residual = residual.transpose(0, -1).contiguous().transpose(0, -1)  # another layout
    weight, wide = torch.randn(shape[-1], device=DEVICE).to(dtype), x.double() + residual.double()
    for impl in ("torch", "triton"):
        s, y = add_rms_norm(x, residual, weight, 0.02, unit_offset=unit_offset, impl=impl)
        assert s.dtype == y.dtype == dtype
        assert torch.equal(s, wide.to(dtype)) and torch.equal(s, residual + x)
        assert torch.equal(y, rms_norm(s, weight, 0.02, unit_offset=unit_offset, impl=impl))


def test_gradients_of_a_sum_and_its_norm():
    x, residual, weight = (torch.randn(*shape, requires_grad=True) for shape in ((3, 5), (3, 5), (5,)))
    draw = torch.randn(2, 3, 5)
    s = x + residual
    exact = torch.stack([s, torch.nn.functional.rms_norm(s, (5,), weight, 0.1)])
    found = torch.stack(add_rms_norm(x, residual, weight, 0.1))
    for ours, theirs in zip(
        torch.autograd.grad((found * draw).sum(), (x, residual, weight)),
        torch.autograd.grad((exact * draw).sum(), (x, residual, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_those_of_the_formula():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    exact = torch.nn.functional.rms_norm(x, (5,), weight, 0.1)
    for found, wanted in zip(
        torch.autograd.grad(rms_norm(x, weight, 0.1).sum(), (x, weight)),
        torch.autograd.grad(exact.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def both(x, residual, weight, unit_offset, impl):
    """A sum, its norm and the norm of that in heads, which lie apart, so that all layouts meet."""
    s, y = add_rms_norm(x, residual, weight, 0.02, unit_offset=unit_offset, impl=impl)
    heads = torch.cat([y, y], -1)[..., : x.shape[-1]]
    return s, rms_norm(heads, weight, 0.02, unit_offset=unit_offset, impl=impl)


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 3, 16), (1, 576), (2, 0, 8), (9,), (600, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_gradients_of_kernels_against_float64(shape, dtype, unit_offset):
    torch.manual_seed(2)
    given = [torch.randn(s, device=DEVICE).to(dtype) for s in (shape, shape, shape[-1:])]
    draws = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)]

    def gradients(impl, of=dtype):
        leaves = [t.to(of).requires_grad_() for t in given]
        if of == torch.float64:
            s = leaves[0] + leaves[1]
            y = s
            for _ in range(2):
                y = y / (y.pow(2).mean(-1, keepdim=True) + 0.02).sqrt() * (leaves[2] + unit_offset)
            found = s, y
        else:
            found = both(*leaves, unit_offset, impl)
        return torch.autograd.grad(found, leaves, [draw.to(of) for draw in draws])

    exact = gradients(None, torch.float64)
    plain, fast, again = gradients("torch"), gradients("triton"), gradients("triton")
    for a, b, twice, wanted in zip(fast, plain, again, exact, strict=True):
        assert a.dtype == dtype and a.shape == wanted.shape and torch.equal(a, twice)
        if wanted.numel():
            errors = [(g.double() - wanted).norm() for g in (a, b)]
            assert errors[0] <= 2 * errors[1] + 1e-6 * wanted.norm()


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (1, 2)])
@pytest.mark.parametrize("used", ["sum", "norm", "both"])
def test_only_what_is_asked_for(asked, used, monkeypatch):
    from lizard_ops.norm import triton_op

    made, gradients = [], triton_op.gradients
    monkeypatch.setattr(triton_op, "gradients", lambda *a: made.append(a[7]) or gradients(*a))
    found = {}
    for impl in ("triton", "torch"):
        torch.manual_seed(3)
        given = [torch.randn(*shape, device=DEVICE) for shape in ((3, 5), (3, 5), (5,))]
        for i in asked:
            given[i].requires_grad_()
        s, y = add_rms_norm(*given, 0.1, impl=impl)
        loss = {"sum": s.sum(), "norm": y.square().sum(), "both": (s * y).sum()}[used]
        wanted = [given[i] for i in asked if used != "sum" or i < 2]
        found[impl] = torch.autograd.grad(loss, wanted) if wanted and loss.requires_grad else ()
    assert not (set(made) - {2 in asked})  # the weight's sums are made where they are asked for alone
    for a, b in zip(found["triton"], found["torch"], strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused_by_name():
    x, weight = torch.randn(3, 5, device=DEVICE, requires_grad=True), torch.randn(5, device=DEVICE)
    (dx,) = torch.autograd.grad(rms_norm(x, weight, 0.1, impl="triton").square().sum(), x, create_graph=True)
    with pytest.raises(ValueError, match='impl: got "triton" for a second derivative of rms_norm'):
        dx.sum().backward()


def test_registered_as_torch_wants_it():
    from lizard_ops.norm.triton_op import add_norm, norm, norm_backward

    x, weight = torch.randn(2, 3, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    for asked in (False, True):
        x, weight = x.detach().requires_grad_(asked), weight.detach().requires_grad_(asked)
        torch.library.opcheck(norm, (x, weight, 1e-5, False))
        torch.library.opcheck(add_norm, (x, x.detach().flip(0), weight, 1e-5, True))
    x, weight = x.detach(), weight.detach()
    torch.library.opcheck(norm_backward, (x, weight, 1e-5, False, x.flip(0), None, True, False))
    torch.library.opcheck(norm_backward, (x, weight, 1e-5, True, x.flip(0), x, False, True))


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_bad_arguments(changes, said):
    given = {"x": torch.ones(2, 4), "weight": torch.ones(4), "eps": 1e-5} | changes
    with pytest.raises(ValueError, match=said):
        rms_norm(**given)


@pytest.mark.parametrize(
    ("residual", "said"),
    [
        (torch.ones(4), "residual: got"),
        (torch.ones(2, 4).half(), "residual: got"),
    ],
)
def test_bad_residuals(residual, said):
    with pytest.raises(ValueError, match=said):
        add_rms_norm(torch.ones(2, 4), residual, torch.ones(4), 1e-5, impl="triton")
