"""The families' norms, and the sums before them, in one kernel: only in a student, and as the family rounds."""

import copy
import pickle

import pytest
import torch
from tiny import FAMILIES, student, teacher, tokens
from transformers import PreTrainedModel

from lizard_models.model import fused_mlp, norms
from lizard_models.model.attention import LizardAttention
from lizard_models.model.norms import KernelNorm
from lizard_ops import add_rms_norm, rms_norm


@pytest.fixture
def calls(monkeypatch):
    """How often the op was asked, as if on a GPU."""
    made = []
    monkeypatch.setattr(norms, "on_gpu", lambda x: True)
    for name, op in (("rms_norm", rms_norm), ("add_rms_norm", add_rms_norm)):
        monkeypatch.setattr(norms, name, lambda *a, name=name, op=op, **k: made.append(name) or op(*a, **k))
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
    sums = 0 if family.startswith("gemma") else 2 * len(model.model.layers)  # Gemma's stand behind norms of their own
    assert calls.count("add_rms_norm") == sums
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "on_gpu", lambda x: False)
        wanted = model(ids, use_cache=False).logits
    assert torch.equal(found, wanted) and len(calls) == used


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_in_training_are_the_familys(calls, family, frozen):
    model, ids = student(family=family).train(), tokens(2, 12)
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or ".lizard." in name)

    def gradients():
        model.zero_grad()
        model(ids, use_cache=False).logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    found, used = gradients(), len(calls)
    assert used == len(names(model))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "on_gpu", lambda x: False)
        wanted = gradients()
    assert len(found) == len(wanted) and len(calls) == used
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_layers_that_are_run_again_take_it_both_times(calls):
    """Each by itself: a norm's sum is not handed on to the next layer, and the last norm is the family's."""
    model, ids = student().train().requires_grad_(True), tokens(2, 12)
    layers, found = len(model.model.layers), []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls.clear()
        model.zero_grad()
        model(ids, use_cache=False).logits.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert calls.count("rms_norm") == calls.count("add_rms_norm") == 2 * layers
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_stage_1_takes_it_around_its_losses(calls):
    model, ids, losses = student(), tokens(2, 12), []
    model.set_attention_mode("distill")
    for on_gpu in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(norms, "on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
            losses.append(model(ids, use_cache=False).loss)
    torch.testing.assert_close(*losses)
    assert len(calls) == len(names(model))


def test_nobody_else_takes_it(calls, monkeypatch):
    monkeypatch.setattr(fused_mlp, "silu_product", pytest.fail)
    model, ids = student(), tokens(2, 12)
    model.set_attention_mode("teacher")
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


@torch.no_grad()
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "where", ["model.layers.1", "model.layers.2.input_layernorm", "model.layers.0.mlp", "model.norm"]
)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_see_and_change_what_they_did(calls, inference, where, before):
    """A norm that was computed beside its sum is not taken where somebody has changed the sum."""

    def change(module, args, output=None):
        (args[0] if output is None else output).mul_(1.5)

    ids, found = tokens(1, 9), []
    for on_gpu in (False, True):
        model = student()
        part = model.get_submodule(where)
        (part.register_forward_pre_hook if before else part.register_forward_hook)(change)
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode(inference):
            patch.setattr(norms, "on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
            outputs = model(ids, use_cache=False, output_hidden_states=True)
        found.append((outputs.logits, *outputs.hidden_states))
    assert "add_rms_norm" in calls
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_take_what_is_set_on_them(calls, family):
    """Any attribute, as transformers' own do: ``epsilon`` of code that knows norms by that name, and another eps."""
    model, ids = student(family=family), tokens(1, 9)
    wanted, found = model(ids, use_cache=False).logits, []
    for name in names(model):
        model.get_submodule(name).epsilon = 0.5
    assert torch.equal(model(ids, use_cache=False).logits, wanted)  # the family's norm reads its own
    for name in names(model):
        norm = model.get_submodule(name)
        setattr(norm, "eps" if hasattr(norm, "eps") else "variance_epsilon", 0.25)
    for on_gpu in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(norms, "on_gpu", lambda x, on_gpu=on_gpu: on_gpu)
            found.append(model(ids, use_cache=False).logits)
    assert torch.equal(*found) and not torch.equal(found[0], wanted)
    model(ids[:, :1])  # a token, which a CPU may compute by itself


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_stand_for_a_familys_keep_nothing_from_being_set(family):
    for module in student(family=family).modules():
        kinds = type(module).__mro__
        theirs = any(kind.__module__.startswith("transformers.models") for kind in kinds)
        ours = isinstance(module, PreTrainedModel | LizardAttention)  # what they say is set by the family's names
        for kind in kinds if theirs and not ours else ():
            if kind.__module__.startswith("lizard_"):
                fixed = [name for name, of in vars(kind).items() if isinstance(of, property) and of.fset is None]
                assert not fixed, (kind, fixed)


@torch.no_grad()
def test_a_layer_alone_takes_it_as_a_students(calls):
    model, x = student(), torch.randn(1, 5, 64)
    layer, rope = model.model.layers[0], model.model.rotary_emb(x, torch.arange(5)[None])
    found = layer(x, position_embeddings=rope)
    assert calls == ["rms_norm", "add_rms_norm"]  # nobody reads the norm of what it returns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "on_gpu", lambda x: False)
        assert torch.equal(layer(x, position_embeddings=rope), found)
    for mode in ("teacher", "distill"):
        model.set_attention_mode(mode)
        layer(x, position_embeddings=rope, attention_mask=None)
    assert len(calls) == 2
