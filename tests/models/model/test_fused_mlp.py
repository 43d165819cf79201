"""SiLU and product of a family's MLP in one kernel: only in a student."""

import copy

import pytest
import torch
from tiny import FAMILIES, student, tokens

from lizard_models.model import fused_mlp, norms
from lizard_models.model.fused_mlp import FusedMLP
from lizard_ops import silu_product


@pytest.fixture
def calls(monkeypatch):
    """How often the op was asked, as if on a GPU."""
    made = []
    monkeypatch.setattr(norms, "on_gpu", lambda x: True)
    monkeypatch.setattr(fused_mlp, "silu_product", lambda *a: made.append(1) or silu_product(*a))
    return made


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_takes_the_kernel_of_its_familys_formula(calls, family):
    changes = {} if family.startswith("gemma") else {"num_hidden_layers": 1}  # Gemma's layers are of two types
    model, ids = student(family=family, **changes).bfloat16(), tokens(2, 12)
    layers = [] if family.startswith("gemma") else model.model.layers  # whose activation is another
    assert all(isinstance(layer.mlp, FusedMLP) for layer in layers)
    found = model(ids, use_cache=False).logits
    assert len(calls) == len(layers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "on_gpu", lambda x: False)
        assert torch.equal(found, model(ids, use_cache=False).logits) and len(calls) == len(layers)


def test_nobody_else_takes_it(calls):
    model, ids = student(), tokens(2, 12)
    model.set_attention_mode("teacher")
    model(ids, use_cache=False)
    model.set_attention_mode("student")
    model.double()(ids, use_cache=False)
    changed = student(hidden_act="relu")
    changed(ids, use_cache=False)
    assert not calls


def test_training_takes_it(calls):
    model, ids = student().train().requires_grad_(True), tokens(2, 12)
    found = []
    for on_gpu in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(norms, "on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
            model.zero_grad()
            model(ids, use_cache=False).logits.square().sum().backward()
        found.append([p.grad for p in model.model.layers[0].mlp.parameters()])
    assert len(calls) == len(model.model.layers)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@torch.no_grad()
def test_hooks_of_the_activation_are_heard(calls):
    model, heard, ids = student(num_hidden_layers=1), [], tokens(1, 6)
    wanted = model(ids, use_cache=False).logits
    assert len(calls) == 1
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *a: heard.append(1))
    assert torch.equal(model(ids, use_cache=False).logits, wanted) and heard and len(calls) == 1
    other = copy.deepcopy(student(num_hidden_layers=1))
    assert torch.equal(other(ids, use_cache=False).logits, wanted) and len(calls) == 2
