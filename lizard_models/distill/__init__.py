"""Distillation of a teacher into a Lizard model: scores of keys, then two stages, or three."""

from lizard_models.distill.arguments import RunArguments
from lizard_models.distill.progress import TrainingInterrupted
from lizard_models.distill.stage0 import Stage0Result, key_scores, score_fit, train_stage0
from lizard_models.distill.stage1 import held_out_errors, train_stage1
from lizard_models.distill.stage2 import FineTuning, train_stage2, train_stage3
from lizard_models.distill.trainer import StageResult

__all__ = [
    "FineTuning",
    "RunArguments",
    "Stage0Result",
    "StageResult",
    "TrainingInterrupted",
    "held_out_errors",
    "key_scores",
    "score_fit",
    "train_stage0",
    "train_stage1",
    "train_stage2",
    "train_stage3",
]
