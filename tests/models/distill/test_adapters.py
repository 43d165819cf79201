"""LoRA with products in the model's dtype: peft's numbers in float32, its own rounding in half precision."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import student, tokens

from lizard_models.distill.adapters import (
    HalfPrecisionLora,
    adapter_layers,
    fuse_adapters,
    low_rank_update,
    without_adapters,
)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_against_float64(dtype):
    """No further from float64 than twice autocast, and the gradients of the float32 parameters are float32."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 65, 32).to(dtype), torch.randn(2, 65, 48).to(dtype)
    down, up = torch.randn(4, 32) / 6, torch.randn(48, 4) / 2
    weight = torch.randn(2, 65, 48).to(dtype)

    def plain(y, x, down, up):
        return y + 0.7 * ((x @ down.to(x.dtype).mT) @ up.to(x.dtype).mT)

    found = []
    for apply, high in ((plain, True), (plain, False), (lambda *a: low_rank_update(*a, 0.7), False)):
        leaves = [t.double() if high else t.clone() for t in (y, x, down, up)]
        leaves = [t.requires_grad_() for t in leaves]
        out = apply(*leaves)
        found.append([out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)])
    # The products in the dtype of x, nothing rounded to it after them.
    inner, outer = ((weight @ up.to(dtype)) * 0.7).flatten(0, 1), (x @ down.to(dtype).mT).flatten(0, 1)
    torch.testing.assert_close(found[2][3], (inner.mT @ x.flatten(0, 1)).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2][4], 0.7 * (weight.flatten(0, 1).mT @ outer).float(), rtol=1e-6, atol=0)
    for i, (exact, simple, ours) in enumerate(zip(*found, strict=True)):
        allowed = 2 * (simple.double() - exact).norm() + 1e-6 * exact.norm()
        assert (ours.double() - exact).norm() <= allowed, i
        assert ours.dtype == (torch.float32 if i > 2 else dtype)
