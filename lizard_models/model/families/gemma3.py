"""Gemma 3 text as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma3TextModel,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder


class LizardGemma3TextConfig(Gemma3TextConfig):
    """A Gemma 3 text config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_gemma3_text"
    lizard: dict | None = None


class LizardGemma3Attention(LizardAttention, Gemma3Attention):  # type: ignore[misc]
    """Gemma 3's projections and head norms around a hybrid attention."""

    eager_attention_forward = staticmethod(eager_attention_forward)

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


AutoConfig.register("lizard_gemma3_text", LizardGemma3TextConfig)
AutoModel.register(LizardGemma3TextConfig, LizardGemma3TextModel)
AutoModelForCausalLM.register(LizardGemma3TextConfig, LizardGemma3ForCausalLM)
