"""How far the student's attention is from its teacher's, in the readings that "relative error" can have.

Shapes: L converted layers, H query heads, S buckets of positions.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lizard_models.evaluation.position_loss import bucket_edges
from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.recipes import Stage1Config


@dataclass(frozen=True)
class AttentionErrors:
    """Sums over tokens from which every reading is made; bucket s holds positions edges[s] <= t < edges[s + 1]."""

    edges: tuple[int, ...]
    squares: Tensor
    """[L, H, S] squared errors of the heads' outputs, float64."""
    targets: Tensor
    """[L, H, S] squares of the teacher's outputs."""
    ratios: Tensor
    """[L, H, S] sum over tokens of squared error over squared target, each token by itself."""
    output_squares: Tensor
    """[L, S] squared errors after the output projection."""
    output_targets: Tensor
    """[L, S] squares of the teacher's outputs after the output projection."""
    tokens: Tensor
    """[S] tokens in each bucket."""

    def per_head(self) -> Tensor:
        """Squared error over squared target [L, H]."""
        return self.squares.sum(-1) / self.targets.sum(-1)

    def readings(self) -> dict[str, float]:
        """One number each for the whole model::

            head mean      mean over layers and heads of (sum of squared errors / sum of squared targets)
            head median    their median
            head geometric their geometric mean, exp of the mean logarithm
            layer pooled   mean over layers of (squared errors of all its heads / squared targets of all its heads)
            pooled         squared errors of all layers and heads / squared targets of all
            token mean     mean over layers, heads and tokens of (squared error / squared target)
            output mean    mean over layers of the ratio after the output projection
            output pooled  squared errors of all layers / squared targets of all, after the output projection
            root           mean over layers and heads of the square root of head mean's ratio

        "head mean" is what stage 1 trains with ``error="relative"``.
        """
        heads = self.per_head()
        squares, targets = self.squares.sum(-1), self.targets.sum(-1)
        outputs, wanted = self.output_squares.sum(-1), self.output_targets.sum(-1)
        values = {
            "head mean": heads.mean(),
            "head median": heads.median(),
            "head geometric": heads.log().mean().exp(),
            "layer pooled": (squares.sum(-1) / targets.sum(-1)).mean(),
            "pooled": squares.sum() / targets.sum(),
            "token mean": (self.ratios.sum(-1) / self.tokens.sum()).mean(),
            "output mean": (outputs / wanted).mean(),
            "output pooled": outputs.sum() / wanted.sum(),
            "root": heads.sqrt().mean(),
        }
        return {name: value.item() for name, value in values.items()}

    def by_position(self) -> list[float]:
        """ "head mean" with numerator and denominator of one bucket alone, for each bucket."""
        return (self.squares / self.targets).mean((0, 1)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Readings, errors by position bucket, by layer and by head, for JSON."""
        heads = self.per_head()
        return {
            "readings": self.readings(),
            "edges": list(self.edges),
            "by_position": self.by_position(),
            "by_layer": heads.mean(1).tolist(),
            "by_head": heads.tolist(),
        }


@torch.no_grad()
def attention_errors(model: LizardCausalLM, tokens: Tensor, batch_size: int = 1) -> AttentionErrors:
    """Errors of the converted layers on ``tokens`` [N, T], every layer on the teacher's own stream.

    Meaningful while the weights outside the new parameters are the teacher's, that is before stage 2.
    """
    device = next(model.parameters()).device
    attentions, mode = model.lizard_attentions(), model.mode
    edges = bucket_edges(tokens.shape[1])
    bucket = torch.bucketize(
        torch.arange(tokens.shape[1], device=device), torch.tensor(edges[1:-1]).to(device), right=True
    )
    sums: list[list[Tensor]] = [[] for _ in attentions]
    with ExitStack() as hooks:
        for attention, found in zip(attentions, sums, strict=True):
            hooks.enter_context(_Watch(attention, bucket, len(edges) - 1, found))
        model.set_attention_mode("distill", Stage1Config(error="relative", target="heads", inputs="teacher"))
        try:
            for batch in tokens.split(batch_size):
                model(input_ids=batch.to(device))
        finally:
            model.set_attention_mode(mode)
    layers = [torch.stack(found).sum(0).cpu() for found in sums]  # [3 H + 2, S] each
    heads = (layers[0].shape[0] - 2) // 3
    squares, targets, ratios, output = torch.stack(layers).split([heads, heads, heads, 2], 1)
    return AttentionErrors(
        edges, squares, targets, ratios, output[:, 0], output[:, 1], torch.bincount(bucket.cpu()) * len(tokens)
    )


class _Watch:
    """While entered, each forward of an attention layer in mode "distill" adds its sums [3 H + 2, S] to ``found``."""

    def __init__(self, attention: LizardAttention, bucket: Tensor, buckets: int, found: list[Tensor]) -> None:
        self.attention, self.bucket, self.buckets, self.found = attention, bucket, buckets, found
        self.student: Tensor | None = None

    def __enter__(self) -> _Watch:
        self.handles = [
            self.attention.lizard.register_forward_hook(self._keep),
            self.attention.o_proj.register_forward_pre_hook(self._measure),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, module: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
        self.student = output[0]

    def _measure(self, module: Any, inputs: tuple[Tensor]) -> None:
        assert self.student is not None
        student, self.student = self.student, None
        target = inputs[0].view_as(student).double()  # [B, T, H, D]
        error = student.double() - target
        squares, targets = error.square().sum(-1), target.square().sum(-1)  # [B, T, H]
        weight = self.attention.o_proj.weight.double()
        output = [(x.flatten(2) @ weight.T).square().sum(-1, keepdim=True) for x in (error, target)]
        tiny = torch.finfo(torch.float32).tiny
        rows = torch.cat([squares, targets, squares / targets.clamp(min=tiny), *output], -1).sum(0)  # [T, 3 H + 2]
        found = rows.new_zeros(self.buckets, rows.shape[1]).index_add_(0, self.bucket, rows)
        self.found.append(found.T)
