"""Scores of kept keys in models trained from scratch: which keys stay is learned from the model's own attention.

No gradient goes through the choice of keys, and there is no teacher. So a model teaches itself: every few steps, on
rows of the batch it trains on, its queries and keys give full softmax attention, from that the labels of stage 0
(``key_labels``), and each layer's ``KeyScore`` takes a step towards them. Nothing else of the model is moved by this,
and nothing of the score by the model's loss.

Shapes: B batch, T length, H heads, N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lizard_models.distill.key_labels import TeacherAttention, key_labels
from lizard_ops import apply_rotary

PACE = 0.1  # of what labels are standardised by: a batch's share of it


@dataclass(frozen=True, kw_only=True)
class KeptKeys:
    """A memory with kept keys: what its bytes go to, and how its scores are learned."""

    window: int | None = None
    """Window; None is a quarter of the hybrid's, at least the 3 keys that scores need."""
    columns: int | None = None
    """Columns of the feature maps; None is half the head dim. Half the sums pay for about as many places again."""
    score_dim: int = 32
    """Width of the scores' inner layer, of which the state carries three."""
    every: int = 4
    """Steps of training from one lesson to the next."""
    rows: int = 16
    """Rows of the batch that a lesson reads."""
    learning_rate: float = 2e-3
    """Peak rate of the scores; it rises and falls with the model's."""
    label: Literal["attention", "output"] = "attention"
    """Largest attention of a later query, or the mean error of all without the key. A key of this task is asked for
    once, and the mean would count that one query among hundreds that attend to nothing."""

    def __post_init__(self) -> None:
        for name in ("score_dim", "every", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window is not None and self.window < 3:
            raise ValueError(f"window of a memory with kept keys must be at least 3 or None, got {self.window}")
        if self.columns is not None and self.columns < 1:
            raise ValueError(f"columns must be at least 1 or None, got {self.columns}")
        if self.label not in ("attention", "output"):
            raise ValueError(f"label must be 'attention' or 'output', got {self.label!r}")


class ScoreLessons:
    """Steps of the scores alone, each on the model's own attention at that time.

    A score starts as keys least like the mean key (``KeyScore``), learns labels less their mean, over their deviation
    (running ones of each head, so that a batch with many pairs and one with few are told the same), by squared error.
    Its size does not matter, since scores are compared within a head only.

    model: a ``RecallModel`` whose mixers keep keys.
    """

    def __init__(self, model: Any, kept: KeptKeys) -> None:
        self.model, self.kept = model, kept
        self.scores = nn.ModuleList(block.mixer.lizard.key_score for block in model.blocks).requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.scores.parameters(), lr=kept.learning_rate, weight_decay=0.0)
        self.moments: list[tuple[Tensor, Tensor]] = []

    def give(self, tokens: Tensor, share: float = 1.0) -> float:
        """One lesson on the first rows of tokens [B, T] at ``share`` of the peak rate; the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.kept.learning_rate
        loss = self.loss(tokens[: self.kept.rows])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # the model's optimizer and its clipping see none of it
        return loss.item()

    def loss(self, tokens: Tensor) -> Tensor:
        """Squared error of the standardised labels, mean over layers, keys and heads."""
        losses = []
        for number, (block, given) in enumerate(zip(self.model.blocks, mixer_inputs(self.model, tokens), strict=True)):
            layer, (x, _, k, v, _) = block.mixer.lizard, given
            labels = self._standard(number, layer_labels(block, given, self.kept.label))
            first, last = layer.config.anchors, tokens.shape[1] - layer.config.window
            delayed = layer.key_score(x, k, v)[0]
            found = delayed[:, first + layer.key_score.delay : last + layer.key_score.delay]
            losses.append((found - labels).square().mean())
        return torch.stack(losses).mean()

    def _standard(self, number: int, labels: Tensor) -> Tensor:
        mean, spread = labels.mean((0, 1)), labels.var((0, 1), correction=0)
        if number == len(self.moments):
            self.moments.append((mean, spread))
        mean, spread = (old.lerp(new, PACE) for old, new in zip(self.moments[number], (mean, spread), strict=True))
        self.moments[number] = mean, spread
        return (labels - mean) / spread.clamp(min=1e-6).sqrt()


def mixer_inputs(model: Any, tokens: Tensor) -> list[tuple[Any, ...]]:
    """What every mixer of a ``RecallModel`` is called with on tokens [B, T], (x, q, k, v, rope), without gradients."""
    found: list[tuple[Any, ...]] = []

    def note(_: nn.Module, given: tuple[Any, ...]) -> None:
        found.append(given)

    handles = [block.mixer.register_forward_pre_hook(note) for block in model.blocks]
    try:
        with torch.no_grad():
            model(tokens, torch.zeros_like(tokens, dtype=torch.bool))  # no logits
    finally:
        for handle in handles:
            handle.remove()
    return found


def layer_labels(block: Any, given: tuple[Any, ...], kind: str) -> Tensor:
    """Labels [B, n, H] of the keys of a layer that are no anchors and leave the window, by its full attention."""
    _, q, k, v, rope = given
    config = block.mixer.lizard.config
    turned_q, turned_k = apply_rotary(q, *rope), apply_rotary(k, *rope)
    attention = TeacherAttention(turned_q, turned_k, v, block.projections[3].weight, config.head_dim**-0.5)
    return key_labels(attention, config.window, kind)[:, config.anchors : q.shape[1] - config.window]


@torch.no_grad()
def values_kept(model: Any, tokens: Tensor, pairs: int) -> float:
    """Share of the N values of rows [B, T] that are an anchor or a kept key of any head or layer at the row's end.

    What the scores alone would let the model answer, whatever the sums hold.
    """
    values = torch.arange(1, 2 * pairs, 2, device=tokens.device)
    alive = torch.zeros(tokens.shape[0], pairs, dtype=torch.bool, device=tokens.device)
    for block, given in zip(model.blocks, mixer_inputs(model, tokens), strict=True):
        layer = block.mixer.lizard
        places = layer(*given, use_state=True)[1].attention.kept_positions.flatten(1)
        alive |= (places.unsqueeze(2) == values).any(1) | (values < layer.config.anchors)
    return alive.float().mean().item()
