"""The ops around a layer's attention launched at once, forward and backward, as ``test_replay`` has attention."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DEVICE
from test_replay import stand_ins  # noqa: F401  # a fixture
from torch import Tensor

from lizard_ops import add_rms_norm, rms_norm, silu_product

pytest.importorskip("triton")
from lizard_ops.gate import parts
from lizard_ops.mlp import triton_op as mlp
from lizard_ops.norm import triton_op as norm
from lizard_ops.tiles import launcher

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="launches by address are the GPU's own there")


def normed(x, weight, unit_offset=False):
    return rms_norm(x, weight, 1e-5, unit_offset=unit_offset, impl="triton")


def summed(x, residual, weight):
    return add_rms_norm(x, residual, weight, 1e-5, impl="triton")


def read(*given):
    return parts.gate_and_bias_in_parts(*given, 2.0)


def heads(length, dtype):
    """Of one product with others."""
    return torch.randn(1, length, 40).to(dtype)[..., 8:].unflatten(-1, (4, 8))


def weights(*shapes):
    return [torch.randn(shape) for shape in shapes]


# what is called, what it is given, and which of that has a gradient
CASES = {
    "norm": (norm, normed, lambda: [torch.randn(2, 3, 8), torch.randn(8)], (0, 1)),
    "norm of heads": (norm, normed, lambda: [heads(3, torch.float16), torch.randn(8).half()], (0, 1)),
    "norm of a frozen weight": (norm, normed, lambda: [torch.randn(2, 3, 8), torch.randn(8)], (0,)),
    "sum": (norm, summed, lambda: [*torch.randn(2, 2, 3, 8), torch.randn(8)], (0, 1, 2)),
    "product": (mlp, lambda *x: silu_product(*x, impl="triton"), lambda: list(torch.randn(2, 2, 3, 8)), (0, 1)),
    "product of halves": (
        mlp, lambda *x: silu_product(*x, impl="triton"), lambda: list(torch.randn(1, 3, 16).bfloat16().chunk(2, -1)),
        (0, 1),
    ),
    "gate": (parts, read, lambda: [torch.randn(1, 9, 16).bfloat16(), *weights((2, 16), (2,), (3, 16), (3,))], range(5)),
    "gate of a frozen input": (
        parts, read, lambda: [torch.randn(2, 9, 16).bfloat16(), *weights((2, 16), (2,), (3, 16)), None], (1, 2, 3)
    ),
}  # fmt: skip


def run(call, given, of, draw):
    """Outputs and gradients."""
    given = [x if x is None else x.detach().requires_grad_(i in of) for i, x in enumerate(given)]
    outputs = call(*given)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    draw = [d.to(o.dtype) for d, o in zip(draw, outputs, strict=False)]
    return [o.detach() for o in outputs], torch.autograd.grad(outputs, [given[i] for i in of], draw)


def same(a, b):
    return all(map(torch.equal, [*a[0], *a[1]], [*b[0], *b[1]]))


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_op(name, monkeypatch):
    module, call, make, of = CASES[name]
    torch.manual_seed(0)
    draws = []
    with monkeypatch.context() as off:
        off.setattr(launcher, "TURNED_OFF", True)
        for _ in range(2):
            given = make()
            outputs = call(*given)
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            draws.append((given, of, [torch.randn(o.shape) for o in outputs]))
        wanted = [run(call, *draw) for draw in draws]
    assert not same(*wanted)
    found = [run(call, *draws[n % 2]) for n in range(4)]
    for function in ("launched", "launched_back"):
        monkeypatch.setattr(module, function, lambda *a: pytest.fail("the op itself was called"))
    found += [run(call, *draws[n % 2]) for n in range(4, 6)]
    for n, tensors in enumerate(found):
        assert same(tensors, wanted[n % 2]), n


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("change", ["hook", "strides", "odd"])
def test_others_go_through_the_op(name, change, stand_ins, monkeypatch):  # noqa: F811
    module, call, make, of = CASES[name]
    torch.manual_seed(0)
    given, calls = make(), []
    outputs = call(*given)
    draw = [torch.randn(o.shape) for o in ([outputs] if isinstance(outputs, Tensor) else outputs)]
    wanted = run(call, given, of, draw)
    for _ in range(3):
        run(call, given, of, draw)
    if change == "hook":
        stand_ins.launch_exit_hook.calls.append(print)
    elif change == "strides":
        given[0] = torch.empty(*given[0].shape, 2, dtype=given[0].dtype)[..., 0].copy_(given[0])
    else:
        odd = torch.empty(given[0].numel() + 1, dtype=given[0].dtype)[1:].view(given[0].shape)
        given[0] = odd.copy_(given[0])
    for function in ("launched", "launched_back"):
        own = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, own=own: calls.append(own(*a)) or calls[-1])
    assert same(run(call, given, of, draw), wanted) and calls
