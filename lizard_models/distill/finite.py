"""Numbers that are not finite: seen at the step that made them, named, and never written to a checkpoint."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lizard_models.distill import parallel
from lizard_models.distill.resume import checkpoints
from lizard_models.files.weights import name_some, nonfinite


@dataclass
class _Step:
    number: int
    names: list[str]
    norms: Tensor  # of each gradient [P]
    readings: Tensor  # loss and norm of all gradients [2], on the host once ``ready``
    ready: Any  # CUDA event, None where the readings are there already


class FiniteWatch:
    """Looks at every step's loss and gradient norm without waiting for the device.

    On a CPU a step that is not finite stops before its update. On a GPU its readings are copied while the next steps
    are queued, so that the run stops a few steps later; the message names the step all the same, and ``settle`` waits
    for all of them before anything is written.
    """

    def __init__(self, title: str, quantity: str, folder: Path) -> None:
        self.title, self.quantity, self.folder = title, quantity, folder
        self.waiting: deque[_Step] = deque()

    def step(self, number: int, loss: Tensor, names: list[str], norms: Tensor, norm: Tensor) -> None:
        """number: of the step, from 1. loss: scalar. names and norms: of the gradients, norm: of all of them.

        Raises FloatingPointError for a loss or norm of this step, or of an earlier one, that is not finite.
        """
        both = torch.stack([loss.detach().float(), norm.detach().float()])
        if not both.is_cuda:
            self._check(_Step(number, names, norms, both, None))
            return
        held = torch.empty(2, pin_memory=True).copy_(both, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        self.waiting.append(_Step(number, names, norms, held, ready))
        self.look()

    def look(self) -> None:
        """Looks at the steps whose readings have come, without waiting. Raises as ``step``."""
        while self.waiting and self.waiting[0].ready.query():
            self._check(self.waiting.popleft())

    def settle(self) -> None:
        """Waits for the steps that are not looked at yet. Raises as ``step``."""
        while self.waiting:
            self.waiting[0].ready.synchronize()
            self._check(self.waiting.popleft())

    def _check(self, step: _Step) -> None:
        loss, norm = step.readings.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        finite = parallel.whole(step.norms).isfinite().tolist()
        bad = [name for name, good in zip(step.names, finite, strict=True) if not good]
        what = f"{self.quantity} is {loss} at step {step.number}"
        if bad:
            what += f", its gradient is not finite in {name_some(bad)}"
        elif not math.isfinite(norm):
            what += f", where the norm of all gradients is {norm}"
        raise FloatingPointError(f"{self.title}: {what}; {self.remedy()}")

    def state(self, step: int, parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Any) -> None:
        """Looks at everything a checkpoint of ``step`` would hold; every process must ask.

        Raises FloatingPointError, in all of them, naming parameters whose weights or AdamW averages are not finite.
        """
        self.settle()
        named = dict(parameters)
        held: dict[str, Tensor] = {**named}
        for name, p in named.items():
            averages = optimizer.state.get(p, {})
            held |= {f"{key} of {name}": v for key, v in averages.items() if isinstance(v, Tensor) and v.ndim}
        bad = parallel.agreed_names(nonfinite({name: parallel.part(v) for name, v in held.items()}))
        if bad:
            raise FloatingPointError(
                f"{self.title}: not finite after step {step}: {name_some(bad)}; no checkpoint is written of it; "
                f"{self.remedy()}"
            )

    def remedy(self) -> str:
        """What to do, with the newest checkpoint there is; all that are written are finite."""
        kept = checkpoints(self.folder)
        advice = "try a smaller learning rate, or float32, in another folder"
        if not kept:
            return f"there is no checkpoint yet; {advice}"
        newest = f"the newest checkpoint, {str(kept[-1])!r}, is finite: go on from it with resume=True"
        return f"{newest}; if it comes again, {advice}"
