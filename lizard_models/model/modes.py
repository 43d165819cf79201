"""What a Lizard decoder and its causal language model share: modes, losses of layers, new parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lizard_layers import Float32Module
from lizard_models.model.attention import AttentionMode, LizardAttention
from lizard_models.model.joined import join_projections
from lizard_models.model.layer_configs import lizard_config
from lizard_models.model.safe_loading import SafeLoading
from lizard_models.recipes import Stage1Config


class LizardModelMixin(SafeLoading):
    """What the decoder and the causal language model share: modes, errors, new parameters, their starts."""

    mode: AttentionMode

    def lizard_attentions(self) -> list[LizardAttention]:
        """The converted attention layers, first to last."""
        layers: Any = self._decoder().layers
        return [layer.self_attn for layer in layers if isinstance(layer.self_attn, LizardAttention)]

    def _decoder(self) -> Any:
        return getattr(self, "model", self)

    def lizard_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the parameters the teacher does not have. All are float32."""
        return ((n, p) for n, p in self.named_parameters() if ".lizard." in n)

    def stage_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of ``lizard_parameters`` that stages 1 and 2 train: all but those of the scores of keys.

        No gradient reaches a score, which only chooses keys; stage 0 fits it.
        """
        return ((n, p) for n, p in self.lizard_parameters() if ".lizard.key_score." not in n)

    def key_scores(self) -> nn.ModuleList:
        """The layers' own scores of keys (``KeyScore``), first to last; none where no layer keeps keys."""
        return nn.ModuleList(a.lizard.key_score for a in self.lizard_attentions() if a.lizard.key_score is not None)

    def set_attention_mode(self, mode: AttentionMode, stage1: Stage1Config | None = None) -> None:
        """Choose what converted layers do: "student", "teacher" (softmax) or "distill" (both, with losses).

        stage1 says which loss "distill" computes and on which inputs; None takes the model's own. Losses of earlier
        forwards are dropped. Raises ValueError for another mode.
        """
        if mode not in get_args(AttentionMode):
            raise ValueError(f"mode must be one of {', '.join(get_args(AttentionMode))}, got {mode!r}")
        recipe = stage1 or lizard_config(self.config).stage1
        self.mode = self._decoder().mode = mode
        for attention in self.lizard_attentions():  # not modules(), which takes milliseconds in every step of stage 2
            attention.mode, attention.last_loss, attention.stage1 = mode, None, recipe

    def layer_losses(self) -> Tensor:
        """Losses [L] float32 of the last forward in mode "distill", in the order of the converted layers.

        Raises ValueError where there was none.
        """
        attentions = self.lizard_attentions()
        errors = [a.last_loss for a in attentions if a.last_loss is not None]
        if not errors or len(errors) < len(attentions):
            raise ValueError('no losses of layers: call set_attention_mode("distill") and run a forward first')
        return torch.stack(errors)

    def _loaded(self) -> None:
        join_projections(self._decoder().layers)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Float32Module):
            loaded = (getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False))
            if not any(loaded):  # transformers calls this after loading too
                module.reset_parameters()
        else:
            super()._init_weights(module)
