"""Qwen2 as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder
from lizard_models.model.families.configs import LizardQwen2Config


class LizardQwen2Attention(LizardAttention, Qwen2Attention):  # type: ignore[misc]
    """Qwen2's projections, with their biases, around a hybrid attention."""

    eager_attention_forward = staticmethod(eager_attention_forward)


class LizardQwen2Model(LizardDecoder, Qwen2Model):
    """Qwen2's decoder with hybrid attention layers."""

    config: LizardQwen2Config
    config_class = LizardQwen2Config
    attention_class = LizardQwen2Attention


class LizardQwen2ForCausalLM(LizardCausalLM, Qwen2ForCausalLM):
    """Qwen2 with hybrid attention layers and a language-model head."""

    config: LizardQwen2Config
    config_class = LizardQwen2Config
    decoder_class = LizardQwen2Model


AutoModel.register(LizardQwen2Config, LizardQwen2Model)
AutoModelForCausalLM.register(LizardQwen2Config, LizardQwen2ForCausalLM)
CAUSAL_LM = LizardQwen2ForCausalLM
