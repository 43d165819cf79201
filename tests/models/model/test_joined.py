"""Projections of one input as one product of weights that lie side by side, whatever happens to these weights."""

import copy
import io
import pickle

import pytest
import torch
from tiny import FAMILIES, teacher, tokens
from tiny import student as copied_student
from torch import nn

from lizard_models import LizardConfig, linearize
from lizard_models.model import joined, norms
from lizard_models.model.joined import adjacent, join_projections, lay_side_by_side

student = copied_student.__wrapped__  # a copy's weights do not lie side by side


@pytest.fixture
def products(monkeypatch):
    """How many products of joined weights there were, as if on a GPU."""
    made, op = [], joined.F.linear
    monkeypatch.setattr(norms, "on_gpu", lambda x: True)
    monkeypatch.setattr(joined, "wants_joined", lambda weight: True)

    class Functional:
        @staticmethod
        def linear(x, weight, bias):
            made.append(weight)
            return op(x, weight, bias)

    monkeypatch.setattr(joined, "F", Functional)
    return made


def memory(model):
    return sum({s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in model.parameters())}.values())


def logits(model):
    return model(tokens(2, 12), use_cache=False).logits


def alone(model):
    """The logits of projections one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joined, "adjacent", lambda tensors: None)
        return logits(model)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_joined_weights(products, family):
    apart = teacher(family)
    wanted, held = {n: p.clone() for n, p in apart.named_parameters()}, memory(apart)
    model = linearize(apart, LizardConfig.preset("plain", attention={"window": 8})).requires_grad_(False)
    assert memory(apart) == held and all(torch.equal(p, wanted[n]) for n, p in apart.named_parameters())
    found = logits(model)
    mlps = 0 if family.startswith("gemma") else len(model.model.layers)  # whose MLP is its own
    assert len(products) == len(model.lizard_attentions()) + mlps
    torch.testing.assert_close(found, alone(model), rtol=1e-4, atol=1e-5)
    assert len(products[0]) == sum(len(p.weight) for p in attention_projections(model.lizard_attentions()[0]))


def attention_projections(part):
    return part.q_proj, part.k_proj, part.v_proj


@torch.no_grad()
def test_results_follow_the_weights(products):
    model = student(num_hidden_layers=1)
    q_proj, k_proj, v_proj = attention_projections(model.model.layers[0].self_attn)
    changes = [
        lambda: k_proj.weight.mul_(1.5),
        lambda: v_proj.weight.data.copy_(v_proj.weight * -1),
        lambda: model.load_state_dict({n: t * 0.7 for n, t in model.state_dict().items()}),
    ]
    for number, change in enumerate(changes):
        before = logits(model)
        change()
        del products[:]
        found = logits(model)
        assert len(products) == 2 and not torch.equal(found, before), number
        torch.testing.assert_close(found, alone(model), rtol=1e-4, atol=1e-5)
    replacements = [
        lambda: setattr(k_proj.weight, "data", k_proj.weight * 2),
        lambda: setattr(q_proj, "weight", nn.Parameter(q_proj.weight * 3, requires_grad=False)),
        lambda: model.load_state_dict({n: t * 0.9 for n, t in model.state_dict().items()}, assign=True),
    ]
    for number, change in enumerate(replacements):
        before = logits(model)
        change()
        del products[:]
        found = logits(model)
        assert len(products) < 2 and not torch.equal(found, before) and torch.equal(found, alone(model)), number
        join_projections(model.model.layers)  # as a move does
        torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_copies_files_and_moves(products, tmp_path):
    model = student(num_hidden_layers=1)
    wanted, held = logits(model), memory(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 1.2 * held
    other = student(num_hidden_layers=1, seed=2)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    assert torch.equal(logits(other), wanted)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * held
    loaded = type(model).from_pretrained(tmp_path).requires_grad_(False)
    copies = {"loaded": loaded, "moved": copy.deepcopy(model).double().float(), "copy": copy.deepcopy(model)}
    copies["pickled"] = pickle.loads(pickle.dumps(model))
    for name, copied in copies.items():
        del products[:]
        torch.testing.assert_close(logits(copied), wanted, rtol=1e-4, atol=1e-5)
        assert len(products) == (2 if name in ("loaded", "moved") else 0), name
        assert memory(copied) == held or name == "pickled"


def test_weights_that_cannot_share_stay_as_they_are(products):
    def made(**changes):
        torch.manual_seed(0)
        return [nn.Linear(4, n, bias=False, **changes) for n in (3, 2)]

    whole = torch.randn(9, 4)
    group = made()
    group[0].weight.data = whole[:3]  # somebody else's memory
    wide = [nn.Linear(4, 3, bias=False), nn.Linear(5, 2, bias=False)]
    tied = made()
    tied[1].weight = tied[0].weight
    mixed = made()
    mixed[1].to(torch.bfloat16)
    turned = made()
    turned[0].weight.data = torch.randn(4, 3).t()
    for modules in (group, wide, tied, mixed, turned, made(device="meta")):
        places = [m.weight.data_ptr() for m in modules]
        lay_side_by_side(modules)
        assert [m.weight.data_ptr() for m in modules] == places
        assert adjacent([m.weight for m in modules]) is None
    group = made()
    optimiser = torch.optim.SGD([m.weight for m in group], lr=0.1)
    lay_side_by_side(group)
    together = adjacent([m.weight for m in group])
    sum(m.weight.sum() for m in group).backward()
    before = together.clone()
    optimiser.step()
    torch.testing.assert_close(together, before - 0.1)


def test_who_looks_or_trains_finds_each_projection(products):
    model = student(num_hidden_layers=1)
    logits(model)
    assert len(products) == 2
    seen = []
    hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *args: seen.append(args[2]))
    logits(model)
    hook.remove()
    assert len(products) == 3 and len(seen) == 1
    model.requires_grad_(True)
    logits(model).sum().backward()
    assert len(products) == 3 and all(
        p.weight.grad.abs().max() > 0 for p in attention_projections(model.model.layers[0].self_attn)
    )
    model.set_attention_mode("teacher")
    with torch.no_grad():
        logits(model)
    assert len(products) == 3
