"""Floating-point operations of a forward and of a training step, counted from a configuration."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedConfig

from lizard_models.model.layer_configs import attention_config, converted_layers, head_dim
from lizard_models.recipes import Recipe, Stage2Config

Stage = Literal["stage0", "stage1", "stage2"]


class Shape:
    """FLOP and bytes per token, of a layer and of the whole student. A product of a [m, k] and a [k, n] matrix counts
    2 m k n; norms, activations, softmax and RoPE count nothing."""

    def __init__(self, config: PreTrainedConfig) -> None:
        d, inner, dim = config.hidden_size, config.intermediate_size, head_dim(config)
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        attention = attention_config(config)
        features = attention.num_features
        converted = converted_layers(config)
        self.layers, self.converted = config.num_hidden_layers, len(converted)
        layers = [attention_config(config, i) for i in converted]
        self.width = queries * dim
        weights = d * dim * (2 * queries + 2 * keys) + 3 * d * inner
        self.dense = 2.0 * self.layers * weights + 2.0 * d * config.vocab_size
        self.dense_without_head = 2.0 * self.layers * weights
        near = sum(layer.window + layer.anchors for layer in layers)
        seen = (near + sum(sum(layer.kept_by_head) for layer in layers) / keys) / max(1, len(layers))
        window = 2 * 2 * seen * self.width
        maps = 2 * (queries + attention.linear_key_heads) * dim * attention.projection_dim
        sums = 2 * 2 * queries * features * dim
        self.student_flop = float(window + (maps + sums) * attention.linear_branch)
        self.student_forward = self.dense + self.converted * self.student_flop
        self.layer_bytes = 2 * (6 * d + 3 * inner + 3 * self.width + 2 * keys * dim) + 2 * features * (queries + keys)

    def teacher_flop(self, length: int) -> float:
        """A forward without the head, softmax attention over ``length`` causal positions."""
        return self.dense_without_head + self.layers * 2 * self.width * length

    def stage_flop(self, stage: Stage, recipe: Recipe, scores: int = 0, checkpointing: bool = False) -> float:
        """FLOP of a training step per token of its sequences::

            stage0  teacher's forward + in each converted layer its attention again, for labels + 6 a number of scores
            stage1  teacher's forward + in each converted layer the student's attention, and twice that backward
            stage2  forward + backward to the inputs (as much) + forward again with checkpointing + teacher's for KL

        scores: numbers of the scores of keys. What adapters add, below a hundredth, and in stage 2 with trained="full"
        the gradients of weights are not counted.
        """
        length = recipe.sequence_length
        if stage == "stage0":
            return self.teacher_flop(length) + self.converted * 2 * self.width * length + 6 * scores
        if stage == "stage1":
            return self.teacher_flop(length) + 3 * self.converted * self.student_flop
        assert isinstance(recipe, Stage2Config)
        return self.student_forward * (3 if checkpointing else 2) + self.teacher_flop(length) * bool(recipe.kl_weight)
