"""Mistral as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder
from lizard_models.model.families.configs import LizardMistralConfig


class LizardMistralAttention(LizardAttention, MistralAttention):  # type: ignore[misc]
    """Mistral's projections around a hybrid attention."""

    eager_attention_forward = staticmethod(eager_attention_forward)


class LizardMistralModel(LizardDecoder, MistralModel):
    """Mistral's decoder with hybrid attention layers."""

    config: LizardMistralConfig
    config_class = LizardMistralConfig
    attention_class = LizardMistralAttention


class LizardMistralForCausalLM(LizardCausalLM, MistralForCausalLM):
    """Mistral with hybrid attention layers and a language-model head."""

    config: LizardMistralConfig
    config_class = LizardMistralConfig
    decoder_class = LizardMistralModel


AutoModel.register(LizardMistralConfig, LizardMistralModel)
AutoModelForCausalLM.register(LizardMistralConfig, LizardMistralForCausalLM)
CAUSAL_LM = LizardMistralForCausalLM
