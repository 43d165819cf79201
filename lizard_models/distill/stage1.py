"""Stage 1, attention approximation: the new parameters learn what the teacher's attention puts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lizard_models.distill.arguments import RunArguments, check_parts
from lizard_models.distill.trainer import StageResult, only_training, run_stage
from lizard_models.model.arithmetic import Shape
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.context import context_part
from lizard_models.model.layer_configs import lizard_config
from lizard_models.recipes import Stage1Config


class AttentionTransfer(nn.Module):
    """The loss of stage 1: the mean over converted layers of each layer's error, from one teacher-forced forward.

    With ``context_group``, over whose ranks every row lies, the mean of the ranks' losses is that of the rows.
    """

    context_group: Any = None

    def __init__(self, model: LizardCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids [B, T], whole rows -> {"loss": float32 scalar}."""
        inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        if self.context_group is not None:
            inputs = context_part(inputs, self.context_group)
        return {"loss": self.model(**inputs).loss}


def train_stage1(
    model: LizardCausalLM, dataset: Dataset, run: RunArguments, recipe: Stage1Config | None = None
) -> StageResult:
    """Trains maps, gates, sinks and mixes to imitate the teacher's attention; every other weight is left alone, scores
    of keys too (stage 0 fits them).

    model: fresh from ``linearize``, so that its other weights are the teacher's. dataset: items {"input_ids": [T]}.
    recipe: default the model's own. The error it names (relative or mse, before or after the output projection) is
    computed in the layers. The model is left in mode "student", eval and frozen.

    Raises what ``run_stage`` does.
    """
    recipe = recipe or lizard_config(model.config).stage1
    check_parts(model, recipe, run.context_parallel, softmax=True)
    new = {name for name, _ in model.stage_parameters()}
    model.set_attention_mode("distill", recipe)
    try:
        with only_training(model, new):
            return run_stage(
                AttentionTransfer(model),
                dataset,
                recipe,
                run,
                quantity=quantity(recipe),
                gate_learning_rate=recipe.gate_learning_rate,
                flop_per_token=Shape(model.config).stage_flop("stage1", recipe),
            )
    finally:
        model.set_attention_mode("student")


def quantity(recipe: Stage1Config) -> str:
    """What the loss of a recipe is called."""
    return "relative error" if recipe.error == "relative" else "squared error"


@torch.no_grad()
def held_out_errors(model: LizardCausalLM, tokens: Tensor, batch_size: int = 1) -> Tensor:
    """Relative errors [L] of the converted layers' heads on held-out ``tokens`` [N, T], teacher-forced.

    The same measure whatever the recipe trains with. Meaningful while the other weights are the teacher's.
    """
    device = next(model.parameters()).device
    mode = model.mode
    model.set_attention_mode("distill", Stage1Config(error="relative", target="heads", inputs="teacher"))
    try:
        errors = []
        for batch in tokens.split(batch_size):
            model(input_ids=batch.to(device))
            errors.append(model.layer_losses() * len(batch))
        return torch.stack(errors).sum(0) / len(tokens)
    finally:
        model.set_attention_mode(mode)
