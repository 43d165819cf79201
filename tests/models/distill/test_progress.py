"""What a person sees of a running stage: a bar on a terminal, elsewhere a line every few seconds and the last one."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lizard_models.distill import progress
from lizard_models.distill.progress import ProgressCallback


@pytest.fixture
def now(monkeypatch):
    """A clock that a test turns on."""
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.seconds)
    return clock


def run(shown: ProgressCallback, now: SimpleNamespace, steps: int, pace: float) -> None:
    """A run of that many steps, each logged."""
    state = SimpleNamespace(global_step=0, max_steps=steps)
    shown.on_train_begin(None, state, None)
    for step in range(1, steps + 1):
        now.seconds += pace
        state.global_step = step
        shown.on_step_end(None, state, None)
        shown.on_log(None, state, None, logs={"loss": 1.0 / step})


def test_lines_come_every_few_seconds_and_at_the_end(now):
    text = io.StringIO()
    shown = ProgressCallback("stage 1", "KL", Console(file=text, width=200), every=10.0)
    run(shown, now, steps=9, pace=4.0)
    said = text.getvalue().splitlines()  # after 4, 16, 28 and 36 seconds
    assert [line.split(" · ")[0] for line in said] == [f"stage 1: step {step}/9" for step in (1, 4, 7, 9)]
    assert said[1].endswith("KL 0.3333 · 4.00 s/step · 0:20 left")  # the loss that was logged last, of step 3
    assert said[-1].endswith("KL 0.1111 · 4.00 s/step · 0:00 left")


def test_a_bar_goes_on_with_every_step(now):
    text = io.StringIO()
    shown = ProgressCallback("stage 1", "KL", Console(file=text, width=200, force_terminal=True))
    run(shown, now, steps=5, pace=4.0)
    (task,) = shown.bar.tasks
    assert (task.completed, task.total) == (5, 5) and "KL 0.2000" in task.fields["status"]
    shown.close()
    assert "5/5" in text.getvalue() and "stage 1: step" not in text.getvalue()
