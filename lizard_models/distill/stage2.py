"""Stages 2 and 3, fine-tuning: LoRA or whole projections, on next tokens, the teacher's distribution, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset

from lizard_models.distill.adapters import adapter_layers, fuse_adapters, without_adapters
from lizard_models.distill.arguments import RunArguments, check_parts
from lizard_models.distill.full_weights import FullWeights
from lizard_models.distill.losses import distillation_loss, logits_of, next_tokens
from lizard_models.distill.trainer import StageResult, only_training, run_stage
from lizard_models.model.arithmetic import Shape
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.checkpointing import run_layers_again
from lizard_models.model.context import context_part
from lizard_models.model.layer_configs import lizard_config
from lizard_models.model.norms import fused_norms
from lizard_models.recipes import Stage2Config


class LanguageModelling(nn.Module):
    """The loss of stage 2, see ``losses.distillation_loss``.

    The teacher is the same weights with the adapters (or the changes of ``FullWeights``) off and softmax attention on:
    no second model is held. Products with adapters are in the model's dtype (``fuse_adapters``).
    With ``context_group``, over whose ranks every row lies, the mean of the ranks' losses is that of the rows.
    """

    context_group: Any = None

    def __init__(self, adapted: Any, recipe: Stage2Config) -> None:
        super().__init__()
        fuse_adapters(adapted)
        self.adapted, self.recipe = adapted, recipe
        self.adapters = adapter_layers(adapted)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """input_ids [B, T], whole rows -> {"loss": float32 scalar}."""
        student = self.adapted.get_base_model()
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        ranks, share, ends = self.context_group, 1.0, True
        if ranks is not None:
            if attention_mask is not None:
                raise ValueError("attention_mask: got one, wanted full rows with context_parallel")
            inputs = context_part({"input_ids": input_ids, "labels": input_ids}, ranks) | {"use_cache": False}
            targets, ends = inputs.pop("shift_labels"), ranks.get_local_rank() == ranks.size() - 1
            del inputs["labels"]
            share = (targets.shape[1] - ends) * ranks.size() / (input_ids.shape[1] - 1)
        else:
            targets = next_tokens(input_ids, attention_mask)
        teacher = self._teacher_hidden(student, inputs) if self.recipe.kl_weight else None
        hidden = student.model(**inputs).last_hidden_state
        if attention_mask is None and ends:  # only the last position of a row predicts nothing
            hidden, targets = hidden[:, :-1], targets[:, :-1]
            teacher = None if teacher is None else teacher[:, :-1]
        loss = distillation_loss(
            hidden,
            logits_of(student),
            targets,
            all_count=attention_mask is None,
            teacher_hidden=teacher,
            teacher_head=logits_of(student),
            cross_entropy_weight=self.recipe.cross_entropy_weight,
            kl_weight=self.recipe.kl_weight,
        )
        return {"loss": loss if ranks is None else loss * share}

    @torch.no_grad()
    def _teacher_hidden(self, student: LizardCausalLM, inputs: dict[str, Any]) -> Tensor:
        decoder: Any = student.model
        off = without_adapters(self.adapters) if self.adapters else self.adapted.disable_adapter()
        student.set_attention_mode("teacher")
        try:
            with off, fused_norms(decoder.layers, decoder.norm):  # no gradient is recorded, so kernels may be taken
                return decoder(**inputs).last_hidden_state
        finally:
            student.set_attention_mode("student")


class FineTuning:
    """A model with what trains beside its projections, through one stage or several, until it is merged.

    model: after stage 1, its other weights still the teacher's. recipe: what trains and how it begins.
    """

    def __init__(self, model: LizardCausalLM, recipe: Stage2Config) -> None:
        new = {name for name, _ in model.stage_parameters()} if recipe.train_new_parameters else set()
        torch.manual_seed(recipe.seed)  # LoRA's random half
        self.model = model.requires_grad_(False)
        self.adapted, prefix = _adapted(model, recipe)
        self.trained = {name for name, p in self.adapted.named_parameters() if p.requires_grad}
        self.trained |= {prefix + name for name in new}

    def train(self, dataset: Dataset, run: RunArguments, recipe: Stage2Config) -> StageResult:
        """A stage with the adapters as they are. Raises what ``run_stage`` does."""
        if run.gradient_checkpointing:
            run_layers_again(self.model, captured=run.cuda_graph)
        kinds = {"cross entropy": recipe.cross_entropy_weight, "KL": recipe.kl_weight}
        try:
            with only_training(self.adapted, self.trained):
                return run_stage(
                    LanguageModelling(self.adapted, recipe),
                    dataset,
                    recipe,
                    run,
                    quantity=" + ".join(name for name, weight in kinds.items() if weight),
                    gate_learning_rate=recipe.gate_learning_rate,
                    new_learning_rate=recipe.new_learning_rate,
                    flop_per_token=Shape(self.model.config).stage_flop("stage2", recipe),
                )
        finally:
            if run.gradient_checkpointing:
                self.model.gradient_checkpointing_disable()

    def learned(self) -> dict[str, Tensor]:
        """What has trained so far, by name."""
        return {name: p for name, p in self.adapted.named_parameters() if name in self.trained}


def train_stage2(
    model: LizardCausalLM,
    dataset: Dataset,
    run: RunArguments,
    recipe: Stage2Config | None = None,
    then: Callable[[FineTuning, StageResult], None] | None = None,
) -> tuple[LizardCausalLM, StageResult]:
    """Fine-tunes with LoRA on the recipe's projections, or these as a whole, and new parameters; merges the result.

    Scores of keys are left alone.

    model: after stage 1, its other weights still the teacher's. dataset: items {"input_ids": [T]}. recipe: default
    the model's own. then: what follows before the merge, such as ``train_stage3``. Returns the same model without
    adapters, an ordinary Lizard, in eval mode and frozen, and the result of this stage.

    Raises ValueError for a projection the model does not have, and what ``run_stage`` does.
    """
    recipe = recipe or lizard_config(model.config).stage2
    check_stage2(model, run, recipe)
    tuning = FineTuning(model, recipe)
    try:
        result = tuning.train(dataset, run, recipe)
        if then is not None:
            then(tuning, result)
    except BaseException:
        tuning.adapted.unload()
        raise
    return tuning.adapted.merge_and_unload(), result


def train_stage3(
    tuning: FineTuning, dataset: Dataset, run: RunArguments, recipe: Stage2Config | None = None
) -> StageResult:
    """Goes on with stage 2 on longer rows: the same adapters, new parameters and loss, with rates of its own.

    tuning: after stage 2. dataset: items {"input_ids": [T]}. recipe: ``Stage3Config.after`` of stage 2's, default that
    of the model's own. Raises what ``train_stage2`` does; ``run.frozen`` must tell what stage 2 has left, else a run
    would go on after another one.
    """
    config = lizard_config(tuning.model.config)
    recipe = recipe or config.stage3.after(config.stage2)
    check_fine_tuning(tuning.model, run, recipe)
    return tuning.train(dataset, run, recipe)


def check_stage2(model: LizardCausalLM, run: RunArguments, recipe: Stage2Config) -> None:
    """Raises ValueError for what stage 2 cannot do with a model, before anything is trained."""
    modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    if missing := sorted(set(recipe.lora_targets) - {leaf for leaf, _ in modules}):
        raise ValueError(f"lora_targets: the model has no {', '.join(missing)}")
    if "lm_head" in recipe.lora_targets or "embed_tokens" in recipe.lora_targets:
        raise ValueError("lora_targets: lm_head and embed_tokens are shared with the teacher and cannot be adapted")
    other = {leaf for leaf, module in modules if leaf in recipe.lora_targets and not isinstance(module, nn.Linear)}
    if other or not recipe.lora_targets:
        named = ", ".join(sorted(other)) or "nothing is named"
        raise ValueError(f"lora_targets: {named}; wanted projections such as q_proj and v_proj")
    check_fine_tuning(model, run, recipe)


def check_fine_tuning(model: LizardCausalLM, run: RunArguments, recipe: Stage2Config) -> None:
    """Raises ValueError for a run that stages 2 and 3 cannot make, whatever their projections are."""
    check_parts(model, recipe, run.context_parallel, softmax=recipe.kl_weight > 0)
    if run.fsdp and recipe.trained == "full":
        raise ValueError('fsdp: trained="full" is not sharded; train adapters (trained="lora"), or without fsdp')
    if run.cuda_graph and recipe.lora_dropout:
        raise ValueError(
            f"cuda_graph: got it with lora_dropout={recipe.lora_dropout}, wanted one of the two: a graph draws nothing"
        )


def _adapted(model: LizardCausalLM, recipe: Stage2Config) -> tuple[Any, str]:
    """The model with what trains beside its projections, and what its parameters' names begin with then."""
    if recipe.trained == "full":
        return FullWeights(model, recipe.lora_targets), "model."
    adapters = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=list(recipe.lora_targets),
    )
    return get_peft_model(model, adapters), "base_model.model."
