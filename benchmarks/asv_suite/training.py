"""A stage 1 step of a small Lizard: all layers, teacher and student, forward and backward."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, linearize


class Stage1Step:
    params = [["recommended", "paper"], [512, 1024]]
    param_names = ["preset", "length"]

    def setup(self, preset, length):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        teacher = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=4096,
            )
        )  # fmt: skip
        self.model = linearize(teacher, LizardConfig.preset(preset))
        self.model.set_attention_mode("distill")
        self.ids = torch.randint(0, 256, (1, length))

    def time_step(self, preset, length):
        self.model(self.ids)
        self.model.attention_errors().sum().backward()
        self.model.zero_grad()
