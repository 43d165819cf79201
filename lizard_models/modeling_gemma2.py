"""Gemma 2 as a Lizard: what differs from transformers' own."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    PreTrainedConfig,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, eager_attention_forward

from lizard_models.modeling_common import LizardAttention, LizardCausalLM, LizardDecoder


class LizardGemma2Config(Gemma2Config):
    """A Gemma 2 config with ``lizard``: the ``to_dict`` of a ``LizardConfig``."""

    model_type = "lizard_gemma2"
    lizard: dict | None = None


class LizardGemma2Attention(LizardAttention, Gemma2Attention):  # type: ignore[misc]
    """Gemma 2's projections around a hybrid attention, where scores are not soft-capped."""

    eager_attention_forward = staticmethod(eager_attention_forward)

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if self.attn_logit_softcapping is not None:
            raise ValueError(
                f"layer {layer_idx} caps its scores (attn_logit_softcapping={self.attn_logit_softcapping}), which the "
                "window does not compute: keep it in softmax_layers, or load the teacher with "
                "attn_logit_softcapping=None"
            )


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


AutoConfig.register("lizard_gemma2", LizardGemma2Config)
AutoModel.register(LizardGemma2Config, LizardGemma2Model)
AutoModelForCausalLM.register(LizardGemma2Config, LizardGemma2ForCausalLM)
