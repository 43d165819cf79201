"""LoRA with products in the model's dtype: peft's numbers in float32, its own rounding in half precision."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import student, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lizard_models.distill.adapters import (
    HalfPrecisionLora,
    adapted_linear,
    adapter_layers,
    fuse_adapters,
    without_adapters,
)
from lizard_models.model.checkpointing import run_layers_again


def adapted(**changes):
    torch.manual_seed(0)
    model = get_peft_model(student(), LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def test_outputs_and_gradients_are_pefts():
    plain = adapted()
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    assert sum(isinstance(m, HalfPrecisionLora) for m in fused.modules()) == 6
    ids, found = tokens(2, 24), []
    for model in (plain, fused):
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        with model.disable_adapter():
            found.append(model(input_ids=ids).logits)
    torch.testing.assert_close(found[2], found[0])
    assert torch.equal(found[1], found[3])
    merged = [model.merge_and_unload() for model in (plain, fused)]
    assert torch.equal(merged[0](ids).logits, merged[1](ids).logits)
    assert not any(isinstance(m, HalfPrecisionLora) for m in merged[1].modules())


def test_without_adapters_is_what_peft_means_by_it():
    model, ids = adapted(), tokens(2, 24)
    fuse_adapters(model)
    with torch.no_grad():
        with_adapters = model(input_ids=ids).logits
        with model.disable_adapter():
            wanted = model(input_ids=ids).logits
        with without_adapters(adapter_layers(model)):
            assert torch.equal(model(input_ids=ids).logits, wanted)
        assert torch.equal(model(input_ids=ids).logits, with_adapters)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_what_the_update_does_not_cover_stays_pefts():
    for changes in (dict(lora_dropout=0.1), dict(use_dora=True), dict(lora_bias=True)):
        model = adapted(**changes)
        fuse_adapters(model)
        assert not any(isinstance(m, HalfPrecisionLora) for m in model.modules())


def test_layers_that_somebody_looks_into_run_pefts_forward():
    plain = adapted()
    fused = copy.deepcopy(plain)
    fuse_adapters(fused)
    ids, seen = tokens(1, 24), []
    layers = [m for m in fused.modules() if isinstance(m, HalfPrecisionLora)]
    hook = layers[0].base_layer.register_forward_hook(lambda module, args, y: seen.append(y))
    torch.testing.assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits)
    hook.remove()
    assert len(seen) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_step_copies_and_adds_no_tensor_of_its_tokens():
    """Forward the update is added where the product lies, backward both parts of the input's gradient in one place."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(65, 32, requires_grad=True), torch.randn(48, 32), torch.randn(65, 48)
    down, up = torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    y = adapted_linear(x, weight, None, down, up, 2.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as trace:
        y = adapted_linear(x, weight, None, down, up, 2.0)
        torch.autograd.grad(y, [x, down, up], grad)
    large = [e.name for e in trace.events() if [65, 32] in e.input_shapes[:1] or [65, 48] in e.input_shapes[:1]]
    assert not {"aten::copy_", "aten::clone", "aten::add", "aten::add_"} & set(large)
    assert large.count("aten::addmm_") == 2


def test_a_base_that_trains_is_refused():
    x, down, up = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2)
    for name, given in (("weight", (torch.randn(5, 4, requires_grad=True), None)),
                        ("bias", (torch.randn(5, 4), torch.randn(5, requires_grad=True)))):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: got one that trains"):
            adapted_linear(x, *given, down, up, 1.0)
    model = adapted(bias="lora_only")
    layers = [m for m in model.modules() if getattr(m, "base_layer", None) is not None]
    layers[0].base_layer.weight.requires_grad_(True)
    fuse_adapters(model)
    assert [isinstance(m, HalfPrecisionLora) for m in layers] == [False] + [True] * (len(layers) - 1)


def drawn(dtype, biased):
    """x, weight, bias, down and up of a layer, and weights of its outputs."""
    torch.manual_seed(0)
    x, w = torch.randn(2, 65, 32).to(dtype), (torch.randn(48, 32) / 6).to(dtype)
    bias = torch.randn(48).to(dtype) if biased else None
    return x, w, bias, torch.randn(4, 32) / 6, torch.randn(48, 4) / 2, torch.randn(2, 65, 48).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_update_against_float64(dtype, biased):
    """No further from float64 than twice autocast, and the gradients of the float32 parameters are float32."""
    x, w, bias, down, up, weight = drawn(dtype, biased)

    def plain(x, down, up):
        base = torch.nn.functional.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return base + 0.7 * ((x @ down.to(x.dtype).mT) @ up.to(x.dtype).mT)

    found = []
    ours = lambda x, down, up: adapted_linear(x, w, bias, down, up, 0.7)  # noqa: E731
    for apply, high in ((plain, True), (plain, False), (ours, False)):
        leaves = [(t.double() if high else t.clone()).requires_grad_() for t in (x, down, up)]
        out = apply(*leaves)
        found.append([out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)])
    # The products in the dtype of x, nothing rounded to it after them.
    inner, outer = ((weight @ up.to(dtype)) * 0.7).flatten(0, 1), (x @ down.to(dtype).mT).flatten(0, 1)
    torch.testing.assert_close(found[2][2], (inner.mT @ x.flatten(0, 1)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2][3], 0.7 * (weight.flatten(0, 1).mT @ outer).float(), rtol=1e-6, atol=0)
    for i, (exact, simple, one) in enumerate(zip(*found, strict=True)):
        allowed = 2 * (simple.double() - exact).norm() + 1e-6 * exact.norm()
        assert (one.double() - exact).norm() <= allowed, i
        assert one.dtype == (torch.float32 if i > 1 else dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_saving_first_changes_no_bit(dtype, biased):
    x, w, bias, down, up, weight = drawn(dtype, biased)
    found = []
    for first in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, down, up)]
        y = adapted_linear(leaves[0], w, bias, *leaves[1:], 0.7, saved_first=first)
        once = torch.autograd.grad((y * weight).sum(), leaves, create_graph=True)
        twice = torch.autograd.grad(sum(g.float().square().sum() for g in once), leaves)
        found.append([y, *once, *twice])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    frozen = adapted_linear(x, w, bias, down.requires_grad_(), up, 0.7, saved_first=True)  # x needs no gradient
    assert torch.equal(frozen, found[0][0]) and torch.autograd.grad((frozen * weight).sum(), down)[0].shape == (4, 32)


class Products(TorchDispatchMode):
    """Counts the products with this weight."""

    def __init__(self, weight):
        super().__init__()
        self.place, self.count = weight.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        product = func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default)
        self.count += product and any(t.data_ptr() == self.place for t in given)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_run_again_does_not_make_its_last_product_again(reentrant):
    """Once forward and once for its input's gradient; the others once more, and no bit of a gradient changes."""
    torch.manual_seed(0)
    names = ["q_proj", "o_proj", "up_proj", "down_proj"]
    model = get_peft_model(student(), LoraConfig(r=4, target_modules=names, init_lora_weights=False)).train()
    fuse_adapters(model)
    layer, ids, found = model.get_base_model().model.layers[1], tokens(2, 24), []
    for again, wanted in ((False, 2), (True, 3 if reentrant else 2)):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with (
            Products(layer.mlp.down_proj.base_layer.weight) as down,
            Products(layer.mlp.up_proj.base_layer.weight) as up,
        ):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert (down.count, up.count) == (wanted, 3 if again else 2)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    copied = copy.deepcopy(model.get_base_model().model.layers[1])
    assert copied.mlp.down_proj.ends == (copied,)


def test_a_last_layer_is_not_run_again_at_all():
    """Its products are made as if nothing were; gradients of all layers are the same bits."""
    torch.manual_seed(0)
    model = get_peft_model(student(), LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)).train()
    fuse_adapters(model)
    base, ids, found = model.get_base_model(), tokens(2, 24), []
    for again in (False, True):
        if again:
            run_layers_again(base)
        model.zero_grad()
        with contextlib.ExitStack() as stack:
            layers = base.model.layers
            products = [stack.enter_context(Products(layer.mlp.up_proj.base_layer.weight)) for layer in layers]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert [p.count for p in products[1:]] == [3 if again else 2] * (len(layers) - 2) + [2]
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(layers) > 2 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    base.gradient_checkpointing_disable()
    assert not any(getattr(part, "gradient_checkpointing", False) for part in base.modules())
