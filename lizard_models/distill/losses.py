"""Language-modelling losses from hidden states, a chunk of positions at a time.

Logits of student and teacher exist for one chunk only, in forward and backward: at 128K vocabulary and 8 x 2048 tokens
both in float32 would be 17 GB. Under a head that does not train nothing is computed twice (``frozen_head``).

Shapes: B batch, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lizard_models.distill.frozen_head import Head, SoftCapped, frozen_head_loss, is_frozen

IGNORED = -100


def logits_of(model: Any) -> Head:
    """What turns the last hidden states of a causal language model into logits, soft-capped as Gemma 2 has it."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return model.lm_head if cap is None else SoftCapped(model.lm_head, cap)


def next_tokens(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The token each position predicts [B, T]: the next one, ``IGNORED`` at the end of a row and at padding."""
    targets = torch.full_like(input_ids, IGNORED)
    targets[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        real = attention_mask.bool()
        targets[:, :-1].masked_fill_(~(real[:, 1:] & real[:, :-1]), IGNORED)
        targets[:, -1] = IGNORED
    return targets


def distillation_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    cross_entropy_weight: float = 1.0,
    kl_weight: float = 0.0,
    chunk: int = 1024,
    all_count: bool = False,
) -> Tensor:
    """Mean over the positions that count of  w_ce (-log p_s(target)) + w_kl sum_v p_t(v) (log p_t(v) - log p_s(v)).

    p_s = softmax(head(hidden)), p_t the teacher's, both in float32. hidden [B, T, H]; targets [B, T] int64, positions
    with ``IGNORED`` count in neither term, so padding and a row's last position carry no KL. teacher_hidden [B, T, H]
    and teacher_head are needed for kl_weight > 0. chunk: positions whose logits exist at a time. all_count: no target
    is ``IGNORED``, which saves reading them back from the device.

    Returns a float32 scalar, differentiable in ``hidden`` and the head; once, if the head has no parameter that trains.
    Raises ValueError without a teacher for KL, or if no position counts.
    """
    if kl_weight and (teacher_hidden is None or teacher_head is None):
        raise ValueError(f"kl_weight={kl_weight} needs teacher_hidden and teacher_head")
    teacher = teacher_hidden if kl_weight else None
    if all_count:
        hidden, targets = hidden.flatten(0, 1), targets.flatten()  # [N, H], [N]
        teacher = None if teacher is None else teacher.flatten(0, 1)
    else:
        counted = targets != IGNORED
        hidden, targets = hidden[counted], targets[counted]
        teacher = None if teacher is None else teacher[counted]
    if not len(targets):
        raise ValueError("targets: no position counts")
    if is_frozen(head):
        return frozen_head_loss(hidden, head, targets, teacher, teacher_head, cross_entropy_weight, kl_weight, chunk)

    def chunk_loss(hidden: Tensor, targets: Tensor, teacher: Tensor | None) -> Tensor:
        log_student = F.log_softmax(head(hidden).float(), -1)  # [n, V]
        loss = log_student.new_zeros(())
        if cross_entropy_weight:
            loss = loss + cross_entropy_weight * F.nll_loss(log_student, targets, reduction="sum")
        if teacher is not None and teacher_head is not None:
            with torch.no_grad():
                log_teacher = F.log_softmax(teacher_head(teacher).float(), -1)
            loss = loss + kl_weight * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return loss

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(
            chunk_loss,
            hidden[part],
            targets[part],
            None if teacher is None else teacher[part],
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total / len(targets)


@torch.no_grad()
def position_losses(hidden: Tensor, head: Head, targets: Tensor, chunk: int = 512) -> Tensor:
    """-log p(target) at every position [B, T], float32, 0 where ``targets`` is ``IGNORED``. Without gradients."""
    flat = hidden.flatten(0, 1)
    parts = [
        F.cross_entropy(head(h).float(), t, reduction="none", ignore_index=IGNORED)
        for h, t in zip(flat.split(chunk), targets.flatten().split(chunk), strict=True)
    ]
    return torch.cat(parts).view_as(targets)
