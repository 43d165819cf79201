"""A whole student on the kernels that it takes on a GPU, here in Triton's interpreter."""

import collections
import importlib
import pkgutil

import pytest
import torch
from tiny import student, tokens
from torch.profiler import ProfilerActivity, profile

import lizard_ops
from lizard_layers import read_input
from lizard_models.model import joined, norms
from lizard_ops.common import checks, dispatch

interpreter = pytest.importorskip("triton.runtime.interpreter")
WORK = ("aten::mm", "aten::addmm", "aten::add", "aten::mul", "aten::silu", "aten::copy_")  # among all operators


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels that start, as if on a GPU; where it holds "dry" they do nothing."""
    if torch.cuda.is_available():
        pytest.skip("test_on_a_gpu.py has the kernels themselves")
    choose, started = dispatch.choose_impl, collections.Counter()
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(lizard_ops.__path__, "lizard_ops.")]
    launch = interpreter.InterpretedFunction.__getitem__

    def as_on_a_gpu(impl, q, beyond):
        return "triton" if impl == "auto" and beyond is None else choose(impl, q, beyond)

    def counted(kernel, grid):
        started[kernel.fn.__name__] += 1
        return (lambda *_, **__: None) if "dry" in started else launch(kernel, grid)

    for module in modules:
        if getattr(module, "choose_impl", None) is choose:
            monkeypatch.setattr(module, "choose_impl", as_on_a_gpu)
    monkeypatch.setattr(checks, "may_read", lambda x: False)  # what kernels leave that do nothing
    monkeypatch.setattr(norms, "on_gpu", lambda x: True)
    monkeypatch.setattr(read_input, "on_gpu", lambda x: True)
    monkeypatch.setattr(joined, "wants_joined", lambda weight: True)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__getitem__", counted)
    return started


@pytest.fixture
def read():
    """Models of one and two layers with a cache that has read a text, as a CPU reads it."""
    made = []
    for layers in (1, 2):
        model = student(num_hidden_layers=layers, intermediate_size=32)
        with torch.no_grad():
            cache = model(tokens(2, 10), use_cache=True).past_key_values
            made.append((model, cache, model(tokens(2, 1, seed=3), past_key_values=cache.copy()).logits))
    return made


@torch.no_grad()
def test_logits_and_launches_of_a_step(read, kernels):
    counts = []
    for model, cache, wanted in read:
        joined.join_projections(model.model.layers)
        if len(model.model.layers) == 2:
            found = model(tokens(2, 1, seed=3), past_key_values=cache).logits
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        kernels.clear()
        kernels["dry"] = 1
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            model(tokens(2, 1), past_key_values=cache)
        counts.append(kernels + collections.Counter({e.key: e.count for e in trace.key_averages() if e.key in WORK}))
        kernels.clear()
    of_a_layer = counts[1] - counts[0]
    assert of_a_layer == {
        "aten::mm": 4,
        "rms_norm_kernel": 2,  # each with the sum before it
        **dict.fromkeys(("token_heads_kernel", "hybrid_decode_kernel", "silu_product_kernel"), 1),
    }
