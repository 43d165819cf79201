"""Next-token loss by position in long documents: where a constant-size memory stops reaching, the loss rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_models.distill.losses import next_tokens, position_losses

Head = Callable[[Tensor], Tensor]  # last hidden states [..., hidden] -> logits [..., vocabulary]


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss in nats over each bucket of positions, with its standard error over documents.

    Bucket b holds positions edges[b] <= t < edges[b + 1]; position t predicts token t + 1.
    """

    edges: tuple[int, ...]
    means: tuple[float, ...]
    errors: tuple[float, ...]  # NaN for a single document

    @classmethod
    def from_positions(cls, losses: Tensor) -> PositionLoss:
        """Buckets of the losses [N, T] of N documents."""
        edges = bucket_edges(losses.shape[1])
        means, errors = [], []
        for start, end in zip(edges, edges[1:], strict=False):
            documents = losses[:, start:end].double().mean(1)
            means.append(documents.mean().item())
            errors.append(documents.std().item() / math.sqrt(len(documents)) if len(documents) > 1 else math.nan)
        return cls(edges, tuple(means), tuple(errors))

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

    Logits exist for some hundred positions at a time, in float32 whatever the model's dtype. advance: called with the
    number of documents done.
    """
    rows = []
    for batch, hidden in _hidden_states(model, tokens, batch_size):
        rows.append(position_losses(hidden, float32_head(model), next_tokens(batch))[:, :-1].cpu())
        advance(len(batch))
    return PositionLoss.from_positions(torch.cat(rows))


@torch.no_grad()
def divergence_by_position(model: Any, teacher: Any, tokens: Tensor, batch_size: int = 1) -> PositionLoss:
    """KL divergence in nats from the teacher's next-token distribution to the model's, by position.

    tokens [N, T + 1]; the same T positions as ``loss_by_position``. Logits are float32.
    """
    rows = []
    pairs = zip(_hidden_states(model, tokens, batch_size), _hidden_states(teacher, tokens, batch_size), strict=True)
    student_head, teacher_head = float32_head(model), float32_head(teacher)
    for (_, hidden), (_, wanted) in pairs:
        rows.append(divergences([hidden], student_head, wanted, teacher_head)[0][:, :-1].cpu())
    return PositionLoss.from_positions(torch.cat(rows))


def divergences(students: Sequence[Tensor], head: Head, wanted: Tensor, teacher_head: Head) -> Tensor:
    """KL [S, B, T] in nats from a teacher's next-token distribution to those of S students with one output layer.

    students, wanted: last hidden states [B, T, hidden]; heads: of ``float32_head``. Logits exist for some hundred
    positions at a time, the teacher's once for all students.
    """
    parts = [hidden.flatten(0, 1).split(512) for hidden in (*students, wanted)]
    found = []
    for *hidden, target in zip(*parts, strict=True):
        log_teacher = F.log_softmax(teacher_head(target), -1)
        logs = (F.log_softmax(head(h), -1) for h in hidden)
        kl = [F.kl_div(log, log_teacher, reduction="none", log_target=True).sum(-1) for log in logs]
        found.append(torch.stack(kl))
    return torch.cat(found, 1).view(len(students), *wanted.shape[:2])


def float32_head(model: Any) -> Head:
    """What turns last hidden states into logits, in float32 whatever the model's dtype, soft-capped where it is."""
    weight = model.lm_head.weight.float()
    cap = getattr(model.config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = F.linear(hidden.float(), weight)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def _hidden_states(model: Any, tokens: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for part in tokens.split(batch_size):
        batch = part.to(device)
        yield batch, model.model(input_ids=batch, use_cache=False).last_hidden_state


def recovered_share(teacher: PositionLoss, control: PositionLoss, student: PositionLoss, past: int) -> float:
    """(L_control - L_student) / (L_control - L_teacher) over the positions from ``past`` on.

    1 where the student reaches the teacher, 0 where its linear branch gives nothing beyond the window.
    """
    return (control.past(past) - student.past(past)) / (control.past(past) - teacher.past(past))
