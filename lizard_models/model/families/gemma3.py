"""Gemma 3 text as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder
from lizard_models.model.families.configs import LizardGemma3TextConfig


class LizardGemma3Attention(LizardAttention, Gemma3Attention):  # type: ignore[misc]
    """Gemma 3's projections and head norms around a hybrid attention."""

    eager_attention_forward = staticmethod(eager_attention_forward)
    norms_heads = True

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class LizardGemma3TextModel(LizardDecoder, Gemma3TextModel):
    """Gemma 3 text's decoder with hybrid attention layers."""

    config: LizardGemma3TextConfig
    config_class = LizardGemma3TextConfig
    attention_class = LizardGemma3Attention


class LizardGemma3ForCausalLM(LizardCausalLM, Gemma3ForCausalLM):
    """Gemma 3 text with hybrid attention layers and a language-model head."""

    config: LizardGemma3TextConfig
    config_class = LizardGemma3TextConfig
    decoder_class = LizardGemma3TextModel


AutoModel.register(LizardGemma3TextConfig, LizardGemma3TextModel)
AutoModelForCausalLM.register(LizardGemma3TextConfig, LizardGemma3ForCausalLM)
CAUSAL_LM = LizardGemma3ForCausalLM
