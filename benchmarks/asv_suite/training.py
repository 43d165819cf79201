"""A stage 1 step of a small Lizard: all layers, teacher and student, forward and backward."""

from __future__ import annotations

from timeit import repeat

import torch
from asv_suite.memory import peak_bytes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, linearize

PRESETS = ["plain", "paper"]


def small_student(preset: str, dtype: torch.dtype = torch.float32):
    """A student of a random four-layer teacher, ready for a step of stage 1."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=4096,
        )
    )  # fmt: skip
    torch.manual_seed(1)
    model = linearize(teacher, LizardConfig.preset(preset)).to(dtype)
    model.requires_grad_(False)
    for _, parameter in model.stage_parameters():
        parameter.requires_grad_(True)
    model.set_attention_mode("distill")
    return model


def tokens(length: int) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(2))


def step(model, ids: Tensor) -> None:
    model.zero_grad()
    model(ids).loss.backward()


class Stage1Step:
    params = [PRESETS, [512, 1024]]
    param_names = ["preset", "length"]

    def setup(self, preset, length):
        self.model, self.ids = small_student(preset), tokens(length)

    def time_step(self, preset, length):
        step(self.model, self.ids)

    def track_peak_memory(self, preset, length):
        return peak_bytes(lambda: step(self.model, self.ids))

    track_peak_memory.unit = "bytes"


class Stage1Growth:
    """Time of a step at twice the length over time at the length; the teacher's own attention is quadratic."""

    params = [PRESETS]
    param_names = ["preset"]

    def setup(self, preset):
        self.model = small_student(preset)

    def track_growth(self, preset):
        short, long = (min(repeat(lambda n=n: step(self.model, tokens(n)), number=1, repeat=3)) for n in (512, 1024))
        return long / short

    track_growth.unit = "ratio"
    track_growth.timeout = 600


class Stage1Error:
    """Error of a float32 step's gradients against float64: the largest, relative to a parameter's gradient norm."""

    params = [PRESETS]
    param_names = ["preset"]

    def track_gradient_error(self, preset):
        single, double = small_student(preset), small_student(preset, torch.float64)
        double.load_state_dict(single.state_dict())
        for model in (single, double):
            step(model, tokens(300))
        pairs = zip(single.lizard_parameters(), double.lizard_parameters(), strict=True)
        return max(
            ((p.grad.double() - q.grad).norm() / q.grad.norm()).item() for (_, p), (_, q) in pairs if q.grad.norm() > 0
        )

    track_gradient_error.unit = "relative"
