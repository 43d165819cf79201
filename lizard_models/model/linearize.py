"""From a teacher to a Lizard model around the teacher's own weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lizard_models.config import LizardConfig
from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.families.support import family_of
from lizard_models.model.joined import join_projections
from lizard_models.model.modes import LizardModelMixin
from lizard_models.model.norms import with_kernel
from lizard_models.model.positions import with_far_positions
from lizard_models.model.row_product import with_row_product


def linearize(model: PreTrainedModel, config: LizardConfig) -> LizardCausalLM:
    """The Lizard model of a teacher, around the same weights.

    model: the causal language model of a family in ``families.FAMILIES``. Its modules are shared, not copied: the
    teacher stays usable, and what trains or moves one moves the other. New parameters are float32, on the device of
    the layer they join; feature maps start blind to the biases of q_proj and k_proj (``start_new_parameters``). On a
    GPU the weights of projections of one input are moved side by side (``model/joined.py``): the same parameters at
    other addresses, which a CUDA graph of the teacher must not have been captured with.

    Raises ValueError for another architecture, a model that is a Lizard already, one with adapters, wrapped modules or
    offloaded weights, an index in ``softmax_layers`` that the model does not have, or a window wider than the sliding
    window of a layer to convert.
    """
    refuse_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model is a {type(model).__name__}, wanted the PreTrainedModel inside it")
    if isinstance(model, LizardModelMixin):
        raise ValueError(f"model is a {type(model).__name__} already: linearize takes its teacher")
    try:
        family = family_of(model.config, model)
    except ValueError as error:
        raise ValueError(f"model cannot be converted: {error}") from None
    refuse_offloaded(model)
    with torch.device("meta"):
        student = family(student_config(model.config, config))
    places = {name for name, _ in student.named_modules()}
    leaves = {n: m for n, m in model.named_modules() if n and not any(True for _ in m.children())}
    if strange := [name for name in leaves if name not in places]:
        raise ValueError(
            f"model has a {type(leaves[strange[0]]).__name__} at {strange[0]}, where a {type(model).__name__} has no "
            "module: take wrappers and parametrizations out of the teacher, and linearize then"
        )
    for name, module in leaves.items():
        student.set_submodule(name, with_kernel(module))
    student.lm_head = with_row_product(student.lm_head)
    teacher_rope: Any = model.model.rotary_emb  # made anew: a teacher cast to half precision has rounded frequencies
    rope = type(teacher_rope)(student.config).to(next(teacher_rope.buffers()).device)
    student.model.rotary_emb = with_far_positions(rope)
    for attention in student.lizard_attentions():
        biases = [getattr(part, "bias", None) for part in (attention.q_proj, attention.k_proj)]
        start_new_parameters(student, attention, attention.q_proj.weight.device, *biases)
    join_projections(student.model.layers)
    student.generation_config = copy.deepcopy(model.generation_config)
    return student.train(model.training)


def refuse_adapters(model: nn.Module) -> None:
    """Raises ValueError for a model of peft's, or one with adapters of peft's in it."""
    for name, module in model.named_modules():
        if any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
            where = f"adapters, a {type(module).__name__} at {name}" if name else f"adapters: a {type(module).__name__}"
            raise ValueError(
                f"model has {where}, whose weights a Lizard would lose: merge them first and convert the result, "
                "model = peft_model.merge_and_unload() (for add_adapter: save the adapter, and "
                "PeftModel.from_pretrained(teacher, folder).merge_and_unload())"
            )


def refuse_offloaded(model: nn.Module) -> None:
    """Raises ValueError for weights that are elsewhere (``device_map``): a model on meta as a whole is meant to be."""
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    hooked = any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules())
    if missing and (hooked or len(missing) < sum(1 for _ in model.parameters())):
        raise ValueError(
            f"model has offloaded weights, such as {missing[0]}: load the teacher whole (no device_map, or one "
            "that fits), or convert its folder with lizard_models.linearize_folder (lizard-attn convert), which "
            "needs the memory of one shard"
        )


def start_new_parameters(
    student: LizardCausalLM,
    attention: LizardAttention,
    device: torch.device | str,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
) -> None:
    """Gives a layer's new parameters, now on the meta device, their starts on ``device``.

    q_bias [Hq * D], k_bias [Hk * D]: of the layer's projections, or None. Qwen2 has some so large that the softmax of a
    feature map would be the same at every token, and hardly have a gradient: maps start blind to them, where they read
    what the projections give, without a norm or RoPE between. On the meta device there is nothing to see.
    """
    attention.lizard.to_empty(device=device)
    for module in attention.lizard.modules():
        student._init_weights(module)
    if attention.q_proj.weight.dtype == torch.float64:
        attention.lizard.double()
    config = attention.lizard.config
    if config.linear_branch and not config.linear_rope and not attention.norms_heads:
        seen = [None if b is None or b.is_meta else b.unflatten(0, (-1, config.head_dim)) for b in (q_bias, k_bias)]
        attention.lizard.feature_maps.start_blind_to(*seen)


def student_config(teacher: PreTrainedConfig, config: LizardConfig) -> PreTrainedConfig:
    """The transformers config of the Lizard model that ``config`` makes of a teacher's."""
    family = family_of(teacher)
    values = {k: v for k, v in teacher.to_dict().items() if k not in ("model_type", "transformers_version")}
    values |= {"architectures": [family.__name__], "lizard": config.to_dict()}
    kind: Any = family.config_class
    student = kind.from_dict(values)
    student._attn_implementation = teacher._attn_implementation
    student._name_or_path = teacher._name_or_path
    return student
