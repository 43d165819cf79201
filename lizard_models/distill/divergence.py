"""A loss that runs away: warned of, then trained again once from the last good checkpoint at half the rate."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback

from lizard_models.distill.log import LogFile
from lizard_models.distill.resume import checkpoints
from lizard_models.files.streams import console

KEPT = 20  # entries of the log of which the median is taken
JUDGED_FROM = 20  # steps, so that a warm-up is not judged
LEAST = 3  # entries, likewise
PATIENCE = 10  # steps that a loss may stay high


class RollBack(Exception):  # noqa: N818  no error: the stage goes on
    """The stage is to go on from its newest checkpoint, with half the rate."""


class Diverged(FloatingPointError):
    """The loss ran away again at half the rate, or where there was no checkpoint."""


class DivergenceCallback(TrainerCallback):
    """Looks at every entry of the log, which is the same in every process.

    A loss over ``factor`` times the median of the last ``KEPT`` that were not is warned of, and no checkpoint is
    written meanwhile, but for one that a signal asks for and the last, so that the newest one is from before. If the
    loss is as high ``PATIENCE`` steps later, ``RollBack`` is raised; in a stage that was rolled back before,
    ``Diverged``.
    """

    def __init__(self, title: str, quantity: str, factor: float, folder: Path, log: LogFile) -> None:
        self.title, self.quantity, self.factor, self.folder, self.log = title, quantity, factor, folder, log
        self.calm: deque[float] = deque(maxlen=KEPT)
        self.high_since: int | None = None
        self.rates: list[float] = []  # that the stage began with
        self.halved = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calm.clear()
        self.calm.extend(entry["loss"] for entry in state.log_history if "loss" in entry)
        self.high_since = None
        self.halved = list(kwargs["lr_scheduler"].base_lrs) != self.rates

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        loss, step = kwargs["logs"].get("loss"), state.global_step
        if loss is None:
            return control
        usual = median(self.calm) if self.calm else loss
        if step < JUDGED_FROM or len(self.calm) < LEAST or loss <= self.factor * usual:
            self.calm.append(loss)
            self.high_since = None
            return self._first(state, control)
        what = f"{self.title}: {self.quantity} is {loss:.4g} at step {step}, {loss / usual:.1f} times what it was"
        if self.high_since is None:
            self.high_since = step
            self.log.write(event="high", step=step, loss=loss, median=usual)
            self._say(f"warning: {what} (median {usual:.4g}); no checkpoint is written while it is")
        elif step - self.high_since >= PATIENCE and step < state.max_steps:
            self._end(what, step, loss)
        return self._unsaved(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Asked before the callback of signals, which has the last word."""
        return self._unsaved(state, control)

    def _unsaved(self, state: Any, control: Any) -> Any:
        if self.high_since is not None and state.global_step < state.max_steps and not control.should_training_stop:
            control.should_save = False
        return control

    def _first(self, state: Any, control: Any) -> Any:
        """From where losses are judged there is a checkpoint to go back to."""
        if state.global_step >= JUDGED_FROM and not checkpoints(self.folder):
            control.should_save = True
        return control

    def _end(self, what: str, step: int, loss: float) -> None:
        newest = checkpoints(self.folder)[-1:]
        if newest and not self.halved:
            self.log.write(event="rolled back", step=step, loss=loss, to=newest[0].name)
            self._say(f"{what}, and stays: back to {newest[0].name}, once, with half the learning rate")
            raise RollBack
        self.log.write(event="diverged", step=step, loss=loss)
        again = " again, at half the learning rate" if self.halved else ""
        kept = f"{str(newest[0])!r} is from before; " if newest else "there is no checkpoint from before; "
        raise Diverged(f"{what}{again}; {kept}try a smaller learning rate, in another folder")

    def _say(self, text: str) -> None:
        if self.log.path is not None:
            console("stderr").print(text, highlight=False)


def halve(optimizer: Any, scheduler: Any) -> None:
    """Halves the rate of every group, now and for the rest of the schedule; checkpoints keep it."""
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
        group["initial_lr"] *= 0.5
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate may be around it
    scheduler.base_lrs = [rate * 0.5 for rate in scheduler.base_lrs]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
