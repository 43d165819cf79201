"""What a person sees of a running stage, and how Ctrl-C ends it."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lizard_models.distill.parallel import any_process, is_main_process, process_count
from lizard_models.files import signals
from lizard_models.files.streams import console as lasting

LAUNCHERS_ECHO = 2.0  # seconds in which a launcher passes on the Ctrl-C that its processes had already


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP in training. The step was finished and a checkpoint written; ``resume`` goes on from
    it. ``number`` is the signal's."""

    number: int = signal.SIGINT


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class ProgressCallback(TrainerCallback):
    """Step, loss, seconds per step and time left: as a bar on a terminal, else as a line every few seconds.

    title: what is running. quantity: name of the loss. every: seconds between lines where there is no terminal.
    """

    def __init__(self, title: str, quantity: str, console: Console | None = None, every: float = 10.0) -> None:
        self.title, self.quantity, self.every = title, quantity, every
        self.console = console or lasting("stderr", quiet=not is_main_process())
        self.loss: float | None = None
        self.times: deque[float] = deque(maxlen=21)
        self.printed = -math.inf
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task(title, total=None, status="")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.times.append(time.monotonic())
        if self.console.is_terminal:
            self.bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.times.append(time.monotonic())
        self._show(state)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" not in kwargs["logs"]:
            return
        self.loss = kwargs["logs"]["loss"]
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"{self.title}: {self.quantity} is {self.loss} at step {state.global_step}; "
                "try a smaller learning rate, or float32"
            )
        self._show(state, last=state.global_step == state.max_steps)

    def _show(self, state: TrainerState, last: bool = False) -> None:
        pace = (self.times[-1] - self.times[0]) / max(1, len(self.times) - 1)
        left = clock(pace * (state.max_steps - state.global_step))
        loss = "" if self.loss is None else f"{self.quantity} {self.loss:.4f} · "
        status = f"{loss}{pace:.2f} s/step · {left} left"
        self.bar.update(self.task, completed=state.global_step, status=status)
        due = last or self.times[-1] - self.printed > self.every
        if due and self.loss is not None and not self.console.is_terminal:
            self.printed = self.times[-1]
            self.console.print(f"{self.title}: step {state.global_step}/{state.max_steps} · {status}", highlight=False)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self.console.is_terminal:
            self.bar.stop()


class InterruptCallback(TrainerCallback):
    """Turns the first Ctrl-C (or SIGTERM, SIGHUP) into: finish this step, write a checkpoint, stop. A second one stops
    at once. A SIGHUP that is ignored, as under nohup, stays ignored.

    A context manager around training: it holds the signal handlers only there, and only in the main thread.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or lasting("stderr", quiet=not is_main_process())
        self.asked = False
        self.asked_at = -math.inf
        self.number: int = signal.SIGINT
        self.previous: signals.Handlers = {}

    def __enter__(self) -> InterruptCallback:
        self.previous = signals.handle(self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        signals.restore(self.previous)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            if process_count() > 1 and time.monotonic() - self.asked_at < LAUNCHERS_ECHO:
                return
            raise KeyboardInterrupt
        self.asked, self.asked_at, self.number = True, time.monotonic(), number
        self.console.print("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.asked = any_process(self.asked, args.device)
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control
