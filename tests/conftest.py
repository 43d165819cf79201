"""Options and fixtures of every test."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from pathlib import Path

import pytest
import quick_dynamo
import quick_interpreter
import torch
from hypothesis import HealthCheck, settings

gc.disable()  # until the modules are imported: see nothing_old_to_collect

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which the tests of the models do before those of the ops.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
        quick_interpreter.install(importlib.import_module("triton.runtime.interpreter"))

started = [str(Path(__file__).parent / "started"), os.environ.get("PYTHONPATH", "")]  # for processes that tests start
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, started))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # theirs too; see set_num_threads below

# pytest gives its handlers to loggers that do not propagate; where this one has any, each step of torch.compile is
# written for it.
logging.getLogger("torch.__trace").propagate = True

torch.set_num_threads(1)  # the workers share the cores; threads of their own only wait for each other

settings.register_profile(
    "steady", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the properties of the ops run")
    parser.addoption("--effort", type=float, default=1.0, help="times the usual number of cases of each property")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no CUDA device is visible")
    if not 1 <= config.getoption("--effort") < float("inf"):
        raise pytest.UsageError(f"--effort {config.getoption('--effort')}: wanted a number from 1 on")


@pytest.fixture(autouse=True, scope="session")
def quick_graphs() -> None:
    """Not where conftest is imported: the process that only hands out tests compiles nothing."""
    quick_dynamo.install()


@pytest.fixture(autouse=True, scope="module")
def nothing_old_to_collect() -> None:
    """What the modules hold is no garbage: every Trainer collects, half a second if it looks through all of that."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Frozen objects would stay at exit, and the libraries that own them say so."""
    gc.unfreeze()
