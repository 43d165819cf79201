"""The projection of heads before a feature map, in PyTorch and in Triton (its interpreter without a GPU)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE

from lizard_ops import project_both, project_heads
from lizard_ops.common.dispatch import on_device

SHAPES = [(2, 70, 4, 2, 16, 16), (1, 5, 3, 1, 10, 7), (1, 130, 2, 2, 64, 40), (1, 0, 2, 1, 8, 8), (1, 5, 3, 1, 10, 136)]


def gradients(impl, x, weight, through_x):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    same, y = project_heads(x, weight, impl=impl)
    torch.manual_seed(1)
    loss = (y.double() * torch.randn(y.shape, dtype=torch.float64).to(DEVICE)).sum()
    if through_x:
        loss = loss + (same.double() * torch.randn(x.shape, dtype=torch.float64).to(DEVICE)).sum()
    loss.backward()
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("through_x", [False, True])
def test_output_and_gradients_are_those_of_the_einsum(shape, dtype, through_x):
    batch, length, heads, maps, dim, features = shape
    torch.manual_seed(0)
    x = torch.randn(batch, length, heads, dim, device=DEVICE, dtype=dtype)
    weight = torch.randn(maps, dim, features, device=DEVICE)
    exact = gradients("torch", x.double(), weight.double(), through_x)
    plain, fast = gradients("torch", x, weight, through_x), gradients("triton", x, weight, through_x)
    for name, reference in exact.items():
        errors = [(found[name].double() - reference).abs().max() if reference.numel() else 0 for found in (fast, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * reference.abs().amax() if reference.numel() else True, name


def test_a_matrix_of_several_tiles_stands_in_shared_memory_once():
    """Three stages of 256 features took 256 KiB, more than any chip has."""
    config = pytest.importorskip("lizard_ops.feature_projection.triton.op").config_for
    x = torch.zeros(1, 1, 1, 64)
    assert [config("input", x, torch.zeros(1, 64, n)).stages for n in (128, 256)] == [3, 1]


def test_sizes_beyond_the_chip_are_named():
    errors = pytest.importorskip("triton.runtime.errors")
    x = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    wanted = r"dim, features: got dim 64, features 512 in torch.bfloat16, .* 232448 bytes of shared memory .*262144"
    with pytest.raises(ValueError, match=wanted), on_device(x, dim=64, features=512):
        raise errors.OutOfResources(262144, 232448, "shared memory")
    with pytest.raises(KeyError), on_device(x, dim=64):
        raise KeyError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("of_weight", [False, True])
def test_a_reused_gradient_holds_the_same_numbers(dtype, of_weight):
    x = torch.randn(2, 33, 2, 16, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, 16, 16, device=DEVICE, requires_grad=of_weight)
    wanted = [x, weight][: 1 + of_weight]
    outer, inner = torch.randn_like(x), torch.randn(2, 33, 2, 16, device=DEVICE, dtype=dtype)
    found = []
    for reuse in (False, True):
        there = outer.clone()
        same, y = project_heads(x, weight, reuse_gradient=reuse, impl="triton")
        found.append(torch.autograd.grad((same, y), wanted, (there, inner)))
        assert (found[-1][0].data_ptr() == there.data_ptr()) is reuse
        assert torch.equal(there, outer) is not reuse
    for plain, reused in zip(*found, strict=True):
        torch.testing.assert_close(plain, reused, rtol=0, atol=0)


def test_a_gradient_of_another_layout_is_left_alone():
    x = torch.randn(1, 6, 2, 8, device=DEVICE, requires_grad=True)
    same, y = project_heads(x, torch.randn(1, 8, 8, device=DEVICE), reuse_gradient=True, impl="triton")
    there = torch.randn(1, 2, 6, 8, device=DEVICE).transpose(1, 2)
    before = there.clone()
    torch.autograd.grad((same, y), x, (there, torch.ones_like(y)))
    assert torch.equal(there, before)


def test_strided_and_expanded_inputs():
    x = torch.randn(2, 3, 40, 8, device=DEVICE).transpose(1, 2)  # [B, T, H, D] of another layout
    weight = torch.randn(1, 8, 12, device=DEVICE).expand(3, 8, 12)
    torch.testing.assert_close(project_heads(x, weight, impl="triton")[1], project_heads(x, weight, impl="torch")[1])


def test_registered_as_torch_wants_it_and_compiles_to_one_graph():
    from lizard_ops.feature_projection.triton.op import project, project_backward_into

    x, weight = torch.randn(1, 9, 2, 8, device=DEVICE), torch.randn(2, 8, 8, device=DEVICE)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(project, (x, weight))
    torch.library.opcheck(project_backward_into, (*(t.detach() for t in (x, weight, x, torch.ones_like(x))), True))

    def both(x, weight):
        same, y = project_heads(x, weight, impl="triton")
        return same * 2, y

    torch.compiler.reset()
    plain, compiled = both(x, weight), torch.compile(both, fullgraph=True, backend="aot_eager")(x, weight)
    sums = [torch.autograd.grad(sum(y.square().sum() for y in found), (x, weight)) for found in (plain, compiled)]
    for a, b in zip(plain + sums[0], compiled + sums[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name, x, weight",
    [
        ("x", torch.randn(4, 2, 8), torch.randn(1, 8, 4)),
        ("x", torch.randn(1, 4, 3, 8), torch.randn(2, 8, 4)),
        ("weight", torch.randn(1, 4, 2, 8), torch.randn(2, 4, 4)),
        ("weight", torch.randn(1, 4, 2, 8), torch.randn(2, 8, 4).half()),
        ("weight", torch.randn(1, 4, 2, 8), torch.randn(8, 4)),
    ],
)
def test_bad_arguments_are_refused_by_name(name, x, weight):
    with pytest.raises(ValueError, match=f"^{name}:"):
        project_heads(x, weight)


@pytest.mark.parametrize(
    ("shape", "other"),
    [
        ((2, 70, 4, 2, 2, 1, 16, 16), {}),
        ((1, 1, 6, 3, 2, 2, 32, 64), {}),
        ((1, 5, 3, 1, 1, 1, 10, 136), {}),
        ((1, 0, 2, 1, 2, 1, 8, 8), {}),
        ((2, 3, 4, 1, 2, 2, 8, 8), {"features": 5}),  # two launches
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("recorded", [False, True])
def test_both_at_once_have_the_bits_of_each(shape, other, dtype, recorded):
    batch, length, heads, maps, key_heads, key_maps, dim, features = shape
    torch.manual_seed(0)
    joined = torch.randn(batch, length, heads + key_heads, dim, device=DEVICE).to(dtype)  # as of one product
    q, k = (x.detach().requires_grad_(recorded) for x in joined.split([heads, key_heads], 2))
    weights = [
        torch.randn(maps, dim, features, device=DEVICE, requires_grad=recorded),
        torch.randn(key_maps, dim, other.get("features", features), device=DEVICE, requires_grad=recorded),
    ]

    def gradients(q_too, k_too, fq, fk):
        torch.manual_seed(1)
        outer = [torch.randn_like(x) for x in (q_too, k_too, fq, fk)]
        return torch.autograd.grad((q_too, k_too, fq, fk), (q, k, *weights), outer) if recorded else ()

    for impl in ("torch", "triton"):
        q_too, fq = project_heads(q, weights[0], impl=impl)
        k_too, fk = project_heads(k, weights[1], impl=impl)
        both = project_both(q, k, *weights, impl=impl)
        wanted = (q_too, k_too, fq, fk)
        assert all(map(torch.equal, both, wanted))
        assert all(map(torch.equal, gradients(*both), gradients(*wanted)))


def test_of_both_one_gradient_may_be_missing():
    q, k = (torch.randn(2, 3, heads, 8, device=DEVICE, requires_grad=True) for heads in (4, 2))
    weights = [torch.randn(maps, 8, 6, device=DEVICE, requires_grad=True) for maps in (1, 2)]
    q_too, _, fq, _ = project_both(q, k, *weights, reuse_gradient=True, impl="triton")
    d_q, d_k, d_query, d_key = torch.autograd.grad((q_too.sum(), fq.sum()), (q, k, *weights), allow_unused=True)
    assert d_k is None and d_key is None
    torch.testing.assert_close(d_q, 1 + weights[0].sum(2).expand_as(q))
    torch.testing.assert_close(d_query, q.sum((0, 1, 2)).expand(6, 8).t()[None])


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"k": torch.randn(1, 3, 2, 8)}, "k"),
        ({"k": torch.randn(1, 4, 3, 8)}, "k"),
        ({"query_weight": torch.randn(3, 8, 4)}, "q"),
        ({"key_weight": torch.randn(2, 4, 4)}, "key_weight"),
    ],
)
def test_both_refuse_by_name(changes, name):
    given = dict(q=torch.randn(1, 4, 4, 8), k=torch.randn(1, 4, 2, 8), query_weight=torch.randn(1, 8, 4))
    with pytest.raises(ValueError, match=f"^{name}:"):
        project_both(**given | {"key_weight": torch.randn(2, 8, 4)} | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_gradients_of_both_have_the_bits_of_each(dtype):
    from lizard_ops.feature_projection.triton.op import gradients, gradients_of_both

    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, heads, 8, device=DEVICE).to(dtype) for heads in (4, 2))
    weights = [torch.randn(maps, 8, 8, device=DEVICE) for maps in (1, 2)]
    dy = [torch.randn_like(x) for x in (q, k)]
    dx = [torch.randn_like(q), torch.randn_like(k)]
    apart = [t.clone() for t in dx]
    wanted = [gradients(x, w, y, d, d, True) for x, w, y, d in zip((q, k), weights, dy, apart, strict=True)]
    found = gradients_of_both(q, k, *weights, *dy, *dx)
    assert all(map(torch.equal, found, wanted)) and all(map(torch.equal, dx, apart))
