"""Teachers with adapters, wrappers or weights elsewhere: converted whole, or refused by name."""

import pytest
import torch
from accelerate import cpu_offload
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from tiny import student, teacher, tokens
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM

from lizard_models import LizardConfig, linearize

CONFIG = LizardConfig.preset("plain", attention={"window": 32})
LORA = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)


def with_adapter():
    model = teacher()
    model.add_adapter(LORA)
    return model


ADAPTED = {
    "add_adapter": with_adapter,
    "lora": lambda: get_peft_model(teacher(), LORA),
    "the model inside": lambda: get_peft_model(teacher(), LORA).base_model.model,
    "of the mlp": lambda: get_peft_model(teacher(), LoraConfig(target_modules=["down_proj"])).base_model.model,
    "ia3": lambda: get_peft_model(teacher(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "prompt": lambda: get_peft_model(teacher(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
    "a lizard's": lambda: get_peft_model(student(), LORA),
}


@pytest.mark.parametrize("form", ADAPTED)
def test_adapters_are_refused_until_they_are_merged(form):
    with pytest.raises(ValueError, match="model has adapters.*merge_and_unload"):
        linearize(ADAPTED[form](), CONFIG)


@torch.no_grad()
def test_merged_adapters_are_converted():
    merged, ids = get_peft_model(teacher(), LORA).merge_and_unload(), tokens(1, 20)
    torch.testing.assert_close(linearize(merged, CONFIG)(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(ids).logits, teacher()(ids).logits)


def test_parametrizations_and_wrappers_are_refused():
    model = teacher()
    parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match="at model.layers.1.mlp.up_proj.parametrizations"):
        linearize(model, CONFIG)
    with pytest.raises(ValueError, match="model is a DataParallel, wanted the PreTrainedModel inside it"):
        linearize(torch.nn.DataParallel(teacher()), CONFIG)


@torch.no_grad()
def test_offloaded_layers_are_refused_and_layers_on_a_device_are_not(tmp_path):
    teacher().save_pretrained(tmp_path / "teacher")
    parts = ("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb", "model.layers.0", "model.layers.1")
    where = dict.fromkeys(parts, "cpu") | {"model.layers.2": "disk"}
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", device_map=where, offload_folder=tmp_path / "offloaded"
    )
    wanted = "model has offloaded weights, such as model.layers.2.*linearize_folder"
    with pytest.raises(ValueError, match=wanted):
        linearize(away, CONFIG)
    with pytest.raises(ValueError, match="model has offloaded weights"):
        linearize(cpu_offload(teacher(), execution_device=torch.device("cpu")), CONFIG)
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", device_map="auto")
    ids = tokens(1, 20)
    torch.testing.assert_close(linearize(here, CONFIG)(ids).logits, here(ids).logits, rtol=1e-4, atol=1e-4)
