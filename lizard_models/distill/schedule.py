"""The learning rate over a run."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def rate_at(step: int, steps: int, warmup_ratio: float, final_ratio: float) -> float:
    """Share of the peak rate: linear up to 1 at the end of the warm-up, then half a cosine down to ``final_ratio``.

    With s = ``step`` from 0, w = max(1, warmup_ratio steps) rounded::

        s < w    (s + 1) / (w + 1)
        s >= w   final + (1 - final) (1 + cos(pi (s - w) / (steps - 1 - w))) / 2

    so the last of ``steps`` steps runs at ``final_ratio``.
    """
    warmup = max(1, round(warmup_ratio * steps)) if warmup_ratio else 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_schedule(optimizer: Optimizer, steps: int, warmup_ratio: float, final_ratio: float) -> LambdaLR:
    """``rate_at`` as a scheduler that multiplies every group's own peak rate."""
    return LambdaLR(optimizer, lambda step: rate_at(step, steps, warmup_ratio, final_ratio))
