"""A loss that runs away: warned of, then trained again once from the last good checkpoint at half the rate."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback

from lizard_models.distill.log import LogFile
from lizard_models.distill.resume import checkpoints, step_of
from lizard_models.files.streams import console

KEPT = 20  # entries of the log of which the median is taken
JUDGED_FROM = 20  # steps, so that a warm-up is not judged
LEAST = 3  # entries, likewise
PATIENCE = 10  # steps that a loss may stay high


class RollBack(Exception):  # noqa: N818  no error: the stage goes on
    """The stage is to go on from ``to``, a checkpoint, with half the rate; later ones are to go."""

    def __init__(self, to: Path) -> None:
        super().__init__(str(to))
        self.to = to


class Diverged(FloatingPointError):
    """The loss ran away again at half the rate, or where there was no checkpoint."""


class DivergenceCallback(TrainerCallback):
    """Looks at every entry of the log, which is the same in every process.

    A loss over ``factor`` times the median of the last ``KEPT`` that were not is warned of, and no checkpoint is
    written meanwhile, but for one that a signal asks for and the last; the newest one from before, ``last_good``, stays
    beside these, however many they are. If the loss is as high ``PATIENCE`` steps later, ``RollBack`` is raised; in a
    stage that was rolled back before, ``Diverged``. A run that goes on while its loss is high knows since when.
    """

    def __init__(self, title: str, quantity: str, factor: float, folder: Path, log: LogFile) -> None:
        self.title, self.quantity, self.factor, self.folder, self.log = title, quantity, factor, folder, log
        self.calm: deque[float] = deque(maxlen=KEPT)
        self.high_since: int | None = None
        self.rates: list[float] = []  # that the stage began with
        self.halved = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calm.clear()
        self.high_since = None
        for entry in state.log_history:
            if "loss" in entry:
                self._judge(entry["step"], entry["loss"])
        self.halved = list(kwargs["lr_scheduler"].base_lrs) != self.rates

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        loss, step = kwargs["logs"].get("loss"), state.global_step
        if loss is None:
            return control
        before, usual = self.high_since, self._judge(step, loss)
        if self.high_since is None:
            return self._first(state, control)
        what = f"{self.title}: {self.quantity} is {loss:.4g} at step {step}, {loss / usual:.1f} times what it was"
        if before is None:
            self.log.write(event="high", step=step, loss=loss, median=usual)
            self._say(f"warning: {what} (median {usual:.4g}); no checkpoint is written while it is")
        elif step - self.high_since >= PATIENCE and step < state.max_steps:
            self._end(what, step, loss)
        return self._unsaved(state, control)

    def _judge(self, step: int, loss: float) -> float:
        """Says in ``high_since`` whether a loss is high; returns the median that it is held against."""
        usual = median(self.calm) if self.calm else loss
        if step < JUDGED_FROM or len(self.calm) < LEAST or loss <= self.factor * usual:
            self.calm.append(loss)
            self.high_since = None
        elif self.high_since is None:
            self.high_since = step
        return usual

    def last_good(self) -> Path | None:
        """While the loss is high, the newest checkpoint from before; None if there is none, and while it is not."""
        if self.high_since is None:
            return None
        return next((path for path in reversed(checkpoints(self.folder)) if step_of(path) < self.high_since), None)

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
        good = self.last_good()
        if good and not self.halved:
            self.log.write(event="rolled back", step=step, loss=loss, to=good.name)
            self._say(f"{what}, and stays: back to {good.name}, once, with half the learning rate")
            raise RollBack(good)
        self.log.write(event="diverged", step=step, loss=loss)
        again = " again, at half the learning rate" if self.halved else ""
        kept = f"{str(good)!r} is from before; " if good else "there is no checkpoint from before; "
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
