"""Runs the machine with a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import run_state_machine_as_test
from subjects import small_chunks
from transformers.utils import logging
from whole import Fuzz


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars, and as it was afterwards."""
    said, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(said)
        if bars:
            logging.enable_progress_bar()


def run(examples: int, steps: int, number: int, machine: type = Fuzz, shrink: float = 30) -> None:
    """Raises what the smallest failing sequence found in ``shrink`` seconds raises; its notes hold the calls."""
    engine.MAX_SHRINKING_SECONDS = shrink
    torch.set_num_threads(1)
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, phases=phases,
        suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    with small_chunks(), quiet():
        run_state_machine_as_test(seed(number)(type("Seeded", (machine,), {})), settings=chosen)
