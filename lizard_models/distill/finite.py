"""Numbers that are not finite: seen at the step that made them, named, and never written to a checkpoint."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lizard_models.distill import parallel
from lizard_models.distill.resume import checkpoints
from lizard_models.files.weights import name_some, nonfinite

LAYER = re.compile(r"(^|\.)layers\.\d+$")


@torch.no_grad()
def first_nonfinite(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Where a forward of ``inputs`` meets NaN or infinity: a weight's name, else the first layer that puts it out.

    Empty for a forward that is finite. In one of several processes weights alone are looked at, since the others do
    not take part in another forward.
    """
    if bad := nonfinite({name: parallel.part(p) for name, p in model.named_parameters()}):
        return f", for {name_some(bad)} is not finite"
    if parallel.process_count() > 1:
        return ""
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and nonfinite({name: hidden}):
                found.append(name)

        return after

    layers = [(name, m) for name, m in model.named_modules() if LAYER.search(name)]
    hooks = [module.register_forward_hook(look(name)) for name, module in layers]
    try:
        model(**inputs)
    except ValueError:  # what an op refuses after the layer that is looked for
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return f", first after {found[0]}" if found else ""


@dataclass
class _Step:
    number: int
    names: list[str]
    norms: Tensor  # of each gradient [P], or of each weight
    readings: Tensor  # loss and norm of all gradients [2], or the largest of the norms [1]; on the host once ``ready``
    ready: Any  # CUDA event, None where the readings are there already


class FiniteWatch:
    """Looks at every step's loss, gradients and updated weights without waiting for the device.

    On a CPU a loss or gradient that is not finite stops the run before its update. On a GPU its readings are copied
    while the next steps are queued, so that the run stops a few steps later; the message names the step all the same,
    and ``settle`` waits for all of them before anything is written.
    """

    def __init__(self, title: str, quantity: str, folder: Path, where: Callable[[], str] = str) -> None:
        self.title, self.quantity, self.folder, self.where = title, quantity, folder, where
        self.waiting: deque[_Step] = deque()

    def step(self, number: int, loss: Tensor, names: list[str], norms: Tensor, norm: Tensor) -> None:
        """number: of the step, from 1. loss: scalar. names and norms: of the gradients, norm: of all of them.

        Raises FloatingPointError for a loss or norm of this step, or of an earlier one, that is not finite.
        """
        self._read(number, names, norms, torch.stack([loss.detach().float(), norm.detach().float()]))

    @torch.no_grad()
    def updated(self, number: int, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """number: of the step whose update these parameters have had. Raises as ``step``, for weights."""
        named = dict(parameters)
        # Sums of magnitudes: of NaN they are NaN, and of the empty shard of a process that has no row they are 0, where
        # a largest magnitude does not exist. In float32, whatever the weights, so that none overflows.
        norms = torch.stack(torch._foreach_norm(list(named.values()), 1, dtype=torch.float32))
        self._read(number, list(named), norms, parallel.whole(norms.max()).float()[None])

    def _read(self, number: int, names: list[str], norms: Tensor, readings: Tensor) -> None:
        if not readings.is_cuda:
            self._check(_Step(number, names, norms, readings, None))
            return
        held = torch.empty(len(readings), pin_memory=True).copy_(readings, non_blocking=True)
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
        readings = step.readings.tolist()
        if all(map(math.isfinite, readings)):
            return
        finite = parallel.whole(step.norms).isfinite().tolist()
        bad = [name for name, good in zip(step.names, finite, strict=True) if not good]
        if len(readings) == 1:
            raise self._broken(step.number, bad)
        loss, norm = readings
        what = f"{self.quantity} is {loss} at step {step.number}"
        if not math.isfinite(loss):
            what += self.where()
        if bad:
            what += f", its gradient is not finite in {name_some(bad)}"
        elif not math.isfinite(norm):
            what += f", where the norm of all gradients is {norm}"
        raise FloatingPointError(f"{self.title}: {what}; {self.remedy()}")

    def refused(self, step: int, error: ValueError) -> Exception:
        """What to raise where an op refused a step: an error of this step if something is not finite, else its own."""
        found = self.where()
        if not found:
            return error
        return FloatingPointError(
            f"{self.title}: {self.quantity} is not finite at step {step}{found} ({error}); {self.remedy()}"
        )

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
            raise self._broken(step, bad)

    def _broken(self, step: int, names: list[str]) -> FloatingPointError:
        return FloatingPointError(
            f"{self.title}: not finite after step {step}: {name_some(names)}; no checkpoint is written of it; "
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
