"""Gemma 2 as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from transformers import AutoModel, AutoModelForCausalLM, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder
from lizard_models.model.families.configs import LizardGemma2Config


class LizardGemma2Attention(LizardAttention, Gemma2Attention):  # type: ignore[misc]
    """Gemma 2's projections around a hybrid attention with soft-capped scores."""

    eager_attention_forward = staticmethod(eager_attention_forward)

    @property
    def softcap(self) -> float | None:  # type: ignore[override]
        """Bound of the scores."""
        return self.attn_logit_softcapping


class LizardGemma2Model(LizardDecoder, Gemma2Model):
    """Gemma 2's decoder with hybrid attention layers."""

    config: LizardGemma2Config
    config_class = LizardGemma2Config
    attention_class = LizardGemma2Attention


class LizardGemma2ForCausalLM(LizardCausalLM, Gemma2ForCausalLM):
    """Gemma 2 with hybrid attention layers and a language-model head."""

    config: LizardGemma2Config
    config_class = LizardGemma2Config
    decoder_class = LizardGemma2Model


AutoModel.register(LizardGemma2Config, LizardGemma2Model)
AutoModelForCausalLM.register(LizardGemma2Config, LizardGemma2ForCausalLM)
CAUSAL_LM = LizardGemma2ForCausalLM
