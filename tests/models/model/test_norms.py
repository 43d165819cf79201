"""The families' norms in one kernel: only in a student that reads without gradients, and as the family rounds."""

import copy
import pickle

import pytest
import torch
from tiny import FAMILIES, student, teacher, tokens

from lizard_models.model import norms
from lizard_models.model.norms import KernelNorm
from lizard_ops import rms_norm


@pytest.fixture
def calls(monkeypatch):
    """How often the op was asked, as if on a GPU."""
    made = []
    monkeypatch.setattr(norms, "on_gpu", lambda x: True)
    monkeypatch.setattr(norms, "rms_norm", lambda *a, **k: made.append(1) or rms_norm(*a, **k))
    return made


def names(model):
    return [name for name, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_student_takes_the_kernel_of_its_familys_formula(calls, family, dtype):
    model = student(family=family).to(dtype)
    assert all(isinstance(model.get_submodule(name), KernelNorm) for name in names(model))
    ids = tokens(2, 12)
    found, used = model(ids, use_cache=False).logits, len(calls)
    assert used == len(names(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "on_gpu", lambda x: False)
        wanted = model(ids, use_cache=False).logits
    assert torch.equal(found, wanted) and len(calls) == used


def test_nobody_else_takes_it(calls):
    model, ids = student(), tokens(2, 12)
    model.requires_grad_(True)
    model(ids, use_cache=False).logits.sum().backward()
    model.requires_grad_(False)
    for mode in ("teacher", "distill"):
        model.set_attention_mode(mode)
        model(ids, use_cache=False)
    with torch.no_grad():
        model.model.norm(torch.randn(2, 64))
        torch.compile(student(num_hidden_layers=1), backend="eager", fullgraph=True)(ids, use_cache=False)
    assert not calls


def test_a_teacher_keeps_its_norms_and_shares_their_weights():
    from lizard_models import LizardConfig, linearize

    own = teacher()
    model = linearize(own, LizardConfig.preset("plain"))
    for name in names(model):
        a, b = own.get_submodule(name), model.get_submodule(name)
        assert not isinstance(a, KernelNorm) and isinstance(b, KernelNorm)
        assert a.weight is b.weight and type(a).__name__ == type(b).__name__ and isinstance(b, type(a))


def test_copies_and_pickles(calls):
    model, ids = student(num_hidden_layers=1), tokens(1, 6)
    wanted = model(ids, use_cache=False).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        del calls[:]
        assert torch.equal(other(ids, use_cache=False).logits, wanted) and len(calls) == 3
