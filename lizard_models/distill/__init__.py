"""Distillation of a teacher into a Lizard model, in two stages."""

from lizard_models.distill.arguments import RunArguments
from lizard_models.distill.progress import TrainingInterrupted
from lizard_models.distill.stage1 import held_out_errors, train_stage1
from lizard_models.distill.stage2 import train_stage2
from lizard_models.distill.trainer import StageResult

__all__ = ["RunArguments", "StageResult", "TrainingInterrupted", "held_out_errors", "train_stage1", "train_stage2"]
