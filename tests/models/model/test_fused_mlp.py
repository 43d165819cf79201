"""SiLU and product of a family's MLP in one kernel: only in a student that reads without gradients."""

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
    model.requires_grad_(True)
    model(ids, use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())
    model.requires_grad_(False)
    for mode in ("teacher", "distill"):
        model.set_attention_mode(mode)
        model(ids, use_cache=False)
    model.set_attention_mode("student")
    model.double()(ids, use_cache=False)
    changed = student(hidden_act="relu")
    changed(ids, use_cache=False)
    assert not calls


@torch.no_grad()
def test_hooks_of_the_activation_are_heard(calls):
    model, heard, ids = student(num_hidden_layers=1), [], tokens(1, 6)
    wanted = model(ids, use_cache=False).logits
    assert len(calls) == 1
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *a: heard.append(1))
    assert torch.equal(model(ids, use_cache=False).logits, wanted) and heard and len(calls) == 1
    other = copy.deepcopy(student(num_hidden_layers=1))
    assert torch.equal(other(ids, use_cache=False).logits, wanted) and len(calls) == 2
