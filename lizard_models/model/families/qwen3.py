"""Qwen3 as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder
from lizard_models.model.families.configs import LizardQwen3Config


class LizardQwen3Attention(LizardAttention, Qwen3Attention):  # type: ignore[misc]
    """Qwen3's projections and head norms around a hybrid attention."""

    eager_attention_forward = staticmethod(eager_attention_forward)
    norms_heads = True

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class LizardQwen3Model(LizardDecoder, Qwen3Model):
    """Qwen3's decoder with hybrid attention layers."""

    config: LizardQwen3Config
    config_class = LizardQwen3Config
    attention_class = LizardQwen3Attention


class LizardQwen3ForCausalLM(LizardCausalLM, Qwen3ForCausalLM):
    """Qwen3 with hybrid attention layers and a language-model head."""

    config: LizardQwen3Config
    config_class = LizardQwen3Config
    decoder_class = LizardQwen3Model


AutoModel.register(LizardQwen3Config, LizardQwen3Model)
AutoModelForCausalLM.register(LizardQwen3Config, LizardQwen3ForCausalLM)
CAUSAL_LM = LizardQwen3ForCausalLM
