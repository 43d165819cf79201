"""From a teacher to a Lizard model around the teacher's own weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lizard_models.config import LizardConfig
from lizard_models.modeling_common import LizardAttention, LizardCausalLM, LizardModelMixin
from lizard_models.modeling_llama import LizardLlamaForCausalLM
from lizard_models.modeling_mistral import LizardMistralForCausalLM
from lizard_models.positions import with_far_positions

FAMILIES: dict[str, type[LizardCausalLM]] = {"llama": LizardLlamaForCausalLM, "mistral": LizardMistralForCausalLM}
"""Teachers' ``model_type`` and the class they become."""


def linearize(model: PreTrainedModel, config: LizardConfig) -> LizardCausalLM:
    """The Lizard model of a teacher, around the same weights.

    model: a LlamaForCausalLM or MistralForCausalLM. Its modules are shared, not copied: the teacher stays usable, and
    what trains or moves one moves the other. New parameters are float32, on the device of the layer they join.

    Raises ValueError for another architecture, a model that is a Lizard already, an index in ``softmax_layers``
    that the model does not have, or a window wider than the teacher's own sliding window.
    """
    if isinstance(model, LizardModelMixin):
        raise ValueError(f"model is a {type(model).__name__} already: linearize takes its teacher")
    family = FAMILIES.get(getattr(model.config, "model_type", ""))
    if family is None or not type(model).__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"model is a {type(model).__name__}, wanted one of LlamaForCausalLM, MistralForCausalLM: other "
            "architectures have no converted attention layer yet"
        )
    with torch.device("meta"):
        student = family(student_config(model.config, config))
    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            student.set_submodule(name, module)
    teacher_rope: Any = model.model.rotary_emb  # made anew: a teacher cast to half precision has rounded frequencies
    rope = type(teacher_rope)(student.config).to(teacher_rope.inv_freq.device)
    student.model.rotary_emb = with_far_positions(rope)
    for attention in student.lizard_attentions():
        start_new_parameters(student, attention, attention.q_proj.weight.device)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)


def start_new_parameters(student: LizardCausalLM, attention: LizardAttention, device: torch.device | str) -> None:
    """Gives a layer's new parameters, now on the meta device, their starts on ``device``."""
    attention.lizard.to_empty(device=device)
    for module in attention.lizard.modules():
        student._init_weights(module)


def student_config(teacher: PreTrainedConfig, config: LizardConfig) -> PreTrainedConfig:
    """The transformers config of the Lizard model that ``config`` makes of a teacher's."""
    family = FAMILIES[teacher.model_type]
    values = {k: v for k, v in teacher.to_dict().items() if k not in ("model_type", "transformers_version")}
    values |= {"architectures": [family.__name__], "lizard": config.to_dict()}
    kind: Any = family.config_class
    student = kind.from_dict(values)
    student._attn_implementation = teacher._attn_implementation
    student._name_or_path = teacher._name_or_path
    return student
