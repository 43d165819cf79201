"""``lizard-attn with transformers``: its server finds a Lizard's class, which it looks up by name in its own module."""

import pytest
import torch
import transformers
from cli_calls import call
from tiny import student, tokens
from transformers.cli.serving import model_manager

from lizard_models.cli.with_module import name_classes
from lizard_models.model.families import FAMILIES, load_family


@torch.no_grad()
def test_the_server_loads_a_lizard(tmp_path):
    model = student()
    model.save_pretrained(tmp_path)
    for family in FAMILIES:
        vars(model_manager.transformers).pop(load_family(family).__name__, None)
    manager = model_manager.ModelManager(device="cpu", dtype="float32")
    with pytest.raises(AttributeError, match="LizardLlamaForCausalLM"):
        manager._load_model(f"{tmp_path}@main")
    name_classes()
    served = manager._load_model(f"{tmp_path}@main")
    assert type(served) is type(model)
    torch.testing.assert_close(served(tokens(1, 20)).logits, model(tokens(1, 20)).logits)


def test_the_command_of_the_package_is_run():
    assert transformers.__version__ in call("with", "transformers", "version").stdout
