"""Frozen MLPs and norms through torch.compile: the same step, and the model as it was afterwards."""

import pytest
import torch
from tiny import student, tokens
from torch import nn
from training import arguments

from lizard_models.distill import compiled as module
from lizard_models.distill.arguments import training_arguments
from lizard_models.distill.compiled import compiled, parts_to_compile
from lizard_models.distill.stage1 import AttentionTransfer


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without the C++ compiler; counts what is compiled."""
    torch.compiler.reset()
    compile, kinds = torch.compile, []

    def without_code(function, **options):
        kinds.append(function.__qualname__)
        return compile(function, backend="aot_eager", **options)

    monkeypatch.setattr(module.torch, "compile", without_code)
    return kinds


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_losses_and_gradients_are_the_plain_ones(family, traced):
    model = student(family=family)
    model.set_attention_mode("distill")
    for _, parameter in model.lizard_parameters():
        parameter.requires_grad_(True)
    made, ids = AttentionTransfer(model), tokens(2, 24)
    parameters = [p for p in made.parameters() if p.requires_grad]
    names = [name for name, _ in made.named_parameters()]
    found = []
    for enabled in (False, True):
        with compiled(made, enabled):
            loss = made(ids)["loss"]
            found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
            assert [name for name, _ in made.named_parameters()] == names
    torch.testing.assert_close(found[1], found[0])
    assert len(traced) == 2  # one of MLPs and one of norms, whatever the number of layers
    assert not any("forward" in vars(m) for m in made.modules())


def test_what_trains_is_left_alone():
    model = student()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    parts = parts_to_compile(model)
    assert model.model.layers[0].mlp not in parts and model.model.layers[1].mlp in parts and model.model.norm in parts
    with pytest.raises(ValueError, match="compile: the model has no frozen MLP or norm"), compiled(nn.Linear(2, 2)):
        pass


def test_sharded_layers_are_not_compiled(tmp_path):
    recipe = student().config.lizard
    with pytest.raises(ValueError, match="compile: sharded layers"):
        training_arguments(recipe, arguments(tmp_path, fsdp=True, compile=True), 1)
