"""Llama as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder
from lizard_models.model.families.configs import LizardLlamaConfig


class LizardLlamaAttention(LizardAttention, LlamaAttention):  # type: ignore[misc]
    """Llama's projections around a hybrid attention."""

    eager_attention_forward = staticmethod(eager_attention_forward)


class LizardLlamaModel(LizardDecoder, LlamaModel):
    """Llama's decoder with hybrid attention layers."""

    config: LizardLlamaConfig
    config_class = LizardLlamaConfig
    attention_class = LizardLlamaAttention


class LizardLlamaForCausalLM(LizardCausalLM, LlamaForCausalLM):
    """Llama with hybrid attention layers and a language-model head."""

    config: LizardLlamaConfig
    config_class = LizardLlamaConfig
    decoder_class = LizardLlamaModel


AutoModel.register(LizardLlamaConfig, LizardLlamaModel)
AutoModelForCausalLM.register(LizardLlamaConfig, LizardLlamaForCausalLM)
CAUSAL_LM = LizardLlamaForCausalLM
