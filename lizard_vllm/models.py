"""The families in vLLM: its own models, with the attention of converted layers exchanged."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from lizard_layers import HybridAttention, config_of_rank, page_layout, part_of_rank
from lizard_models.model.families import load_family
from lizard_models.model.layer_configs import converted_layers, head_dim
from lizard_models.model.positions import position_range
from lizard_vllm.checks import true_types
from lizard_vllm.layer import LizardLayer, OwnTurns, Turns


class LizardModel:
    """Mixed into a family's model in vLLM.

    It is what vLLM's protocols HasInnerState, IsHybrid (models without kept softmax layers too) and
    SupportsMambaPrefixCaching ask for; inherited, their own __init__ would stand before the family's.
    """

    has_inner_state = is_hybrid = supports_mamba_prefix_caching = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with true_types(vllm_config.model_config.hf_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
            convert(self, vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """One page of bytes a sequence and layer, of the widest layer."""
        return ((page_bytes(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """A page is copied whole."""
        return (get_temporal_copy_spec,)

    @classmethod
    def get_mamba_state_copy_funcs(cls, mamba_types: set[Any]) -> dict[Any, tuple[Any, ...]]:
        return {kind: cls.get_mamba_state_copy_func() for kind in mamba_types}


class LizardLlamaForCausalLM(LizardModel, LlamaForCausalLM):
    """Llama."""


class LizardMistralForCausalLM(LizardModel, MistralForCausalLM):
    """Mistral."""


class LizardQwen2ForCausalLM(LizardModel, Qwen2ForCausalLM):
    """Qwen2."""


class LizardQwen3ForCausalLM(LizardModel, Qwen3ForCausalLM):
    """Qwen3."""


class LizardSmolLM3ForCausalLM(LizardModel, LlamaForCausalLM):
    """SmolLM3, which is a Llama some of whose layers turn nothing."""


class LizardGemma2ForCausalLM(LizardModel, Gemma2ForCausalLM):
    """Gemma 2."""


class LizardGemma3ForCausalLM(LizardModel, Gemma3ForCausalLM):
    """Gemma 3 text."""


def attentions(config: Any) -> dict[int, Any]:
    """The model's own attention layers without their weights, by index: they know their scale, cap and positions.

    Kept ones are the family's, as in the model: a converted one could not have their window.
    """
    lizard = load_family(config.model_type.removeprefix("lizard_")).decoder_class.attention_class
    converted = converted_layers(config)
    with torch.device("meta"):
        kinds = (lizard if i in converted else lizard.__bases__[-1] for i in range(config.num_hidden_layers))
        return {i: kind(config, i) for i, kind in enumerate(kinds)}


def page_bytes(vllm_config: Any) -> int:
    """Bytes of the largest state of a layer, on the rank of tensor parallelism that has most."""
    dtype, size = vllm_config.model_config.dtype, vllm_config.parallel_config.tensor_parallel_size
    with true_types(vllm_config.model_config.hf_config) as config:
        own = attentions(config)
        whole = [own[i].hybrid_config() for i in converted_layers(config)]
        parts = [config_of_rank(layer, rank, size) for layer in whole for rank in range(size)]
        return max((page_layout(part, dtype).nbytes for part in parts), default=0)


def convert(model: Any, vllm_config: Any) -> None:
    """Exchange the attention of converted layers, and the rotary embedding of kept ones, in a model of vLLM's."""
    config = vllm_config.model_config.hf_config
    own, converted = attentions(config), converted_layers(config)
    turns = Turns(rotary_of(config), position_range(config))
    size, rank = page_bytes(vllm_config), get_tensor_model_parallel_rank()
    for i, layer in enumerate(model.model.layers):
        kind = config.layer_types[i] if getattr(config, "layer_types", None) and turns.by_kind else None
        use_rope = bool(getattr(own[i], "use_rope", True))
        name = layer.self_attn.attn.layer_name.removesuffix(".attn")
        if i not in converted:
            own_turns = OwnTurns(turns, kind, head_dim(config), use_rope, vllm_config, f"{name}.rotary_emb")
            layer.self_attn.rotary_emb = own_turns
            continue
        part = config_of_rank(own[i].hybrid_config(), rank, vllm_config.parallel_config.tensor_parallel_size)
        attention = HybridAttention(part).requires_grad_(False)
        weights: Any = attention.parameters()
        for parameter in weights:
            parameter.weight_loader = partial(load_part, rank)
        layer.self_attn = LizardLayer(layer.self_attn, attention, turns, vllm_config, name)
        layer.self_attn.use_rope, layer.self_attn.layer_type, layer.self_attn.page_bytes = use_rope, kind, size


def load_part(rank: int, parameter: torch.Tensor, loaded: torch.Tensor) -> None:
    """vLLM's loader of a parameter of our own: the heads of a rank, of a whole layer's."""
    parameter.data.copy_(part_of_rank(loaded, parameter.shape, rank))


def rotary_of(config: Any) -> Any:
    """The model's own rotary embedding, exact at any position, on the CPU."""
    family: Any = load_family(config.model_type.removeprefix("lizard_"))
    with torch.device("meta"):
        kind = type(family.decoder_class(config).rotary_emb)
    with torch.device("cpu"):
        rotary = kind(config)
    rotary.reach(position_range(config))
    return rotary
