"""Operators called as functions: only where nobody would see the difference."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lizard_ops import chunk_hybrid_attn, recurrent_hybrid_attn
from lizard_ops.common.direct import direct
from lizard_ops.common.state import map_fields


@torch.library.custom_op("lizard_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@twice.register_fake
def _(x):
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, d: 2 * d)


def call(x):
    return direct(twice, x, None)(x)


class Sees(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_function_is_called_where_nobody_looks():
    x = torch.randn(3)
    for given in (x, torch.nn.Parameter(x, requires_grad=False)):
        assert direct(twice, given) is not twice
        assert torch.equal(call(given), 2 * x)
    with torch.no_grad():
        assert direct(twice, x.requires_grad_()) is not twice
    assert direct(twice, x) is twice
    call(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_whoever_looks_sees_the_operator():
    x, name = torch.randn(3), "lizard_tests.twice.default"
    with Sees() as mode:
        call(x)
    assert name in mode.seen
    assert name in str(make_fx(call)(x).code)
    assert name in torch.export.export(Calls(), (x,), strict=False).graph_module.code
    graphs = []
    torch.compile(call, backend=lambda graph, _: graphs.append(graph.code) or graph.forward, fullgraph=True)(x)
    assert "twice" in graphs[0]
    seen = []
    torch.func.functionalize(lambda t: seen.append(direct(twice, t)) or t)(x)
    with forward_ad.dual_level():
        seen.append(direct(twice, x))
    assert seen == [twice, twice]
    assert direct(twice, torch.empty(3, device="meta").as_subclass(Own)) is twice


class Calls(torch.nn.Module):
    def forward(self, x):
        return call(x)


class Own(torch.Tensor):
    pass


def test_a_step_in_place_counts_versions_up(monkeypatch, request):
    device = request.config.getoption("--device")
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    draw = torch.Generator().manual_seed(0)

    def rows(length, heads=1):
        return [torch.randn(1, length, heads, 4, generator=draw).to(device) for _ in range(5)]

    options = dict(feature_map="softmax", mix="merge", coverage="outside", output_final_state=True)
    with torch.no_grad():
        state = map_fields(torch.Tensor.contiguous, chunk_hybrid_attn(*rows(5), None, 3, **options)[1])
        versions = [t._version for t in state if t is not None]
        recurrent_hybrid_attn(*rows(1), None, 3, **options, initial_state=state, inplace=True, impl="triton")
    assert all(t._version > v for t, v in zip([t for t in state if t is not None], versions, strict=True))
    weights = torch.ones(1, 3, 1, 4, device=device, requires_grad=True)
    product = (weights * state.ring_k).sum()
    with torch.no_grad():
        recurrent_hybrid_attn(*rows(1), None, 3, **options, initial_state=state, inplace=True, impl="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        state = map_fields(torch.Tensor.contiguous, chunk_hybrid_attn(*rows(5), None, 3, **options)[1])
        recurrent_hybrid_attn(*rows(1), None, 3, **options, initial_state=state, inplace=True, impl="triton")
