"""What a stage did, as lines of JSON in a file: losses, rates, gradient norms, speed, memory, and what happened."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lizard_models.distill.parallel import is_main_process, process_count
from lizard_models.distill.speed import MEASURED
from lizard_models.files.streams import console


class LogFile:
    """A file that grows by whole lines, from one run to the next. Other processes than the main one write nothing.

    A line that was cut by a kill or a full disk stays alone. A disk that takes no line is told of once, and the run
    goes on: what it must not lose is in its checkpoints.
    """

    def __init__(self, path: Path | None, stage: str) -> None:
        self.path = path if is_main_process() else None
        self.stage = stage
        self.lost = False

    def write(self, **values: Any) -> None:
        """Adds one line: the stage, the time, and ``values``."""
        if self.path is None or self.lost:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = json.dumps({"stage": self.stage, "time": now, **values}) + "\n"
        try:
            with self.path.open("ab+") as file:
                end = file.seek(0, 2)
                if end:
                    file.seek(end - 1)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode())
        except OSError as error:
            self.lost = True
            console("stderr").print(f"note: {self.path} cannot be written ({error}); the run goes on without its log")


class LogCallback(TrainerCallback):
    """Writes a line for every entry of Trainer's log that has a loss, and for what happened.

    A line has ``step``, ``loss`` (the mean over the steps since the last line, and over processes), ``grad_norm``
    (before clipping), ``learning_rates`` (of each group of parameters), ``seconds`` (since the stage began in this
    process), and what ``Speed`` gives.
    """

    def __init__(self, log: LogFile) -> None:
        self.log = log
        self.began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()
        event = "resumed" if state.global_step else "began"
        self.log.write(event=event, step=state.global_step, steps=state.max_steps, processes=process_count())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        values: dict[str, Any] = {name: logs[name] for name in ("loss", "grad_norm") if name in logs}
        first, *others = kwargs["lr_scheduler"].base_lrs
        rate = logs["learning_rate"]  # of the first group, in this step; the scheduler is at the next one already
        values["learning_rates"] = [rate, *(other * rate / first for other in others)]
        values["seconds"] = time.monotonic() - self.began
        values |= {name: logs[name] for name in MEASURED if name in logs}
        self.log.write(step=state.global_step, **values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.write(event="saved", step=state.global_step)
