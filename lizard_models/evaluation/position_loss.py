"""Next-token loss by position in long documents: where a constant-size memory stops reaching, the loss rises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lizard_models.distill.losses import logits_of, next_tokens, position_losses


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss in nats over each bucket of positions, with its standard error over documents.

    Bucket b holds positions edges[b] <= t < edges[b + 1]; position t predicts token t + 1.
    """

    edges: tuple[int, ...]
    means: tuple[float, ...]
    errors: tuple[float, ...]  # NaN for a single document

    @property
    def perplexities(self) -> tuple[float, ...]:
        """exp of the means."""
        return tuple(math.exp(mean) for mean in self.means)

    def past(self, position: int) -> float:
        """Mean loss over all positions from ``position`` on, which must be an edge."""
        start = self.edges.index(position)
        widths = [b - a for a, b in zip(self.edges[start:], self.edges[start + 1 :], strict=False)]
        return sum(w * m for w, m in zip(widths, self.means[start:], strict=True)) / sum(widths)


def bucket_edges(length: int) -> tuple[int, ...]:
    """0, 128, 512, 1024, 2048, ... up to ``length``, the number of positions that predict a token."""
    edges = [0, 128]
    edges += [512 << i for i in range(max(0, length.bit_length() - 9))]
    return (*(edge for edge in edges if edge < length), length)


@torch.no_grad()
def loss_by_position(
    model: Any, tokens: Tensor, batch_size: int = 1, advance: Callable[[int], None] = lambda count: None
) -> PositionLoss:
    """Loss of a causal language model on documents ``tokens`` [N, T + 1], for its T positions that predict a token.

    Logits exist for some hundred positions at a time, in float32. advance: called with the number of documents done.
    """
    device = next(model.parameters()).device
    rows = []
    for batch in tokens.split(batch_size):
        batch = batch.to(device)
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
        rows.append(position_losses(hidden, logits_of(model), next_tokens(batch))[:, :-1].double().cpu())
        advance(len(batch))
    losses = torch.cat(rows)  # [N, T]
    edges = bucket_edges(losses.shape[1])
    means, errors = [], []
    for start, end in zip(edges, edges[1:], strict=False):
        documents = losses[:, start:end].mean(1)
        means.append(documents.mean().item())
        errors.append(documents.std().item() / math.sqrt(len(documents)) if len(documents) > 1 else math.nan)
    return PositionLoss(edges, tuple(means), tuple(errors))


def recovered_share(teacher: PositionLoss, control: PositionLoss, student: PositionLoss, past: int) -> float:
    """(L_control - L_student) / (L_control - L_teacher) over the positions from ``past`` on.

    1 where the student reaches the teacher, 0 where its linear branch gives nothing beyond the window.
    """
    return (control.past(past) - student.past(past)) / (control.past(past) - teacher.past(past))
