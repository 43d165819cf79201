"""Qwen3 as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, eager_attention_forward

from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.decoder import LizardDecoder


class LizardQwen3Config(Qwen3Config):
    """A Qwen3 config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_qwen3"
    lizard: dict | None = None


class LizardQwen3Attention(LizardAttention, Qwen3Attention):  # type: ignore[misc]
    """Qwen3's projections and head norms around a hybrid attention."""

    eager_attention_forward = staticmethod(eager_attention_forward)

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


AutoConfig.register("lizard_qwen3", LizardQwen3Config)
AutoModel.register(LizardQwen3Config, LizardQwen3Model)
AutoModelForCausalLM.register(LizardQwen3Config, LizardQwen3ForCausalLM)
