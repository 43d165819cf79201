"""SmolLM3 as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM, SmolLM3ForCausalLM, SmolLM3Model
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder
from lizard_models.model.families.configs import LizardSmolLM3Config


class LizardSmolLM3Attention(LizardAttention, SmolLM3Attention):  # type: ignore[misc]
    """SmolLM3's projections around a hybrid attention; every fourth layer turns nothing (NoPE)."""

    eager_attention_forward = staticmethod(eager_attention_forward)


class LizardSmolLM3Model(LizardDecoder, SmolLM3Model):
    """SmolLM3's decoder with hybrid attention layers."""

    config: LizardSmolLM3Config
    config_class = LizardSmolLM3Config
    attention_class = LizardSmolLM3Attention


class LizardSmolLM3ForCausalLM(LizardCausalLM, SmolLM3ForCausalLM):
    """SmolLM3 with hybrid attention layers and a language-model head."""

    config: LizardSmolLM3Config
    config_class = LizardSmolLM3Config
    decoder_class = LizardSmolLM3Model


AutoModel.register(LizardSmolLM3Config, LizardSmolLM3Model)
AutoModelForCausalLM.register(LizardSmolLM3Config, LizardSmolLM3ForCausalLM)
CAUSAL_LM = LizardSmolLM3ForCausalLM
