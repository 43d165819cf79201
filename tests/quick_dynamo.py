"""torch.compile's tracer without what it does again for every graph and no test reads.

The same graphs in less time (test_quick_dynamo.py compares them). A release of torch that lacks what is to be changed
stays as it is.
"""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from typing import Any

REPLACED: list[tuple[Any, str, Any]] = []  # owner, name and value as it came


def install() -> None:
    """Change ``torch._dynamo`` for this process, once."""
    bytecode = importlib.import_module("torch._dynamo.bytecode_transformation")
    tracer = getattr(importlib.import_module("torch._dynamo.symbolic_convert"), "InstructionTranslatorBase", None)
    config = importlib.import_module("torch._dynamo.config")
    guards = importlib.import_module("torch._dynamo.guards")
    exc = importlib.import_module("torch._dynamo.exc")
    cleaned = getattr(bytecode, "_cached_cleaned_instructions", None)
    if REPLACED or not (
        hasattr(cleaned, "__wrapped__")
        and hasattr(tracer, "is_co_filename_from_nn_modules")
        and hasattr(config, "run_gc_after_compile")
        and hasattr(guards, "profile_guard_manager")
        and hasattr(exc, "_extract_stack_with_positions")
    ):
        return
    # A model calls more functions than the 128 whose instructions are remembered.
    replace(bytecode, "_cached_cleaned_instructions", functools.cache(cleaned.__wrapped__))
    # Every node of a graph holds the text of the lines that called it, but for those of torch.nn: here, of all.
    replace(tracer, "is_co_filename_from_nn_modules", lambda self: True)
    config.run_gc_after_compile = False
    # The guards of every graph are timed, behind a flush of the caches that takes 24 ms.
    replace(guards, "profile_guard_manager", lambda *_: 0.0)
    # A graph that breaks tells what called it, with the columns of a hundred frames.
    replace(exc, "_extract_stack_with_positions", lines_alone)


def lines_alone() -> traceback.StackSummary:
    stack = traceback.StackSummary.extract(traceback.walk_stack(sys._getframe(1)), lookup_lines=False)
    stack.reverse()
    return stack


def replace(owner: Any, name: str, value: Any) -> None:
    REPLACED.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)
