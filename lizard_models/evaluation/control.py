"""The window control: the model beside every result."""

from __future__ import annotations

from lizard_models.config import LizardConfig
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.linearize import linearize
from lizard_models.teachers.find import Teacher


def window_control(teacher: Teacher, config: LizardConfig) -> LizardCausalLM:
    """The teacher with a window and its first four tokens, and nothing else: the control beside every result.

    The windows and the layers kept softmax are ``config``'s. Weights are the teacher's own, not copied.
    """
    control = LizardConfig.preset(
        "window_only",
        attention={"window": config.attention.window},
        wide_layers=list(config.wide_layers),
        wide_window=config.wide_window,
        softmax_layers=list(config.softmax_layers),
        softmax_share=config.softmax_share,
        keep_sliding_layers=config.keep_sliding_layers,
    )
    return linearize(teacher.model, control).requires_grad_(False)
