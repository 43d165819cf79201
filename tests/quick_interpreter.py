"""Triton's interpreter without the work that it repeats or throws away: the same numbers in less than half the time.

``install`` changes three things, each named below. ops/test_quick_interpreter.py compares a kernel's results with those
of the interpreter as it comes. A release of Triton that lacks what is to be changed stays as it is. Triton is not
imported here, since its first import reads TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

ALREADY_PATCHED = SimpleNamespace(restore=lambda: None)
REPLACED: list[tuple[Any, str, Any]] = []  # owner, name and value as it came


def install(interpreter: ModuleType) -> None:
    """Change ``triton.runtime.interpreter`` for this process, once."""
    builder = getattr(interpreter, "interpreter_builder", None)
    executor = getattr(interpreter, "GridExecutor", None)
    options = getattr(builder, "options", None)
    if REPLACED or not (
        hasattr(interpreter, "tl")
        and hasattr(interpreter, "_patch_lang")
        and hasattr(interpreter, "_get_np_dtype")
        and callable(executor)
        and hasattr(options, "debug")
        and hasattr(options, "sanitize_overflow")
    ):
        return
    # Sums and products of integers are made again in 64 bits for an assertion that is made only with options.debug.
    replace(builder, "options", dataclasses.replace(options, sanitize_overflow=options.debug))
    replace(interpreter, "_get_np_dtype", remembered(interpreter._get_np_dtype))
    patch_once, launch = once_a_launch(interpreter.tl, interpreter._patch_lang, executor.__call__)
    replace(interpreter, "_patch_lang", patch_once)
    replace(executor, "__call__", launch)


def replace(owner: Any, name: str, value: Any) -> None:
    REPLACED.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def remembered(numpy_type: Callable) -> Callable:
    """The types of numpy, whose table is made anew at every call."""
    known = functools.cache(numpy_type)

    def of(dtype):
        return numpy_type(dtype) if dtype.scalar.is_ptr() else known(dtype.scalar)

    return of


def once_a_launch(tl: ModuleType, patch_lang: Callable, launch: Callable) -> tuple[Callable, Callable]:
    """Patch triton.language once a launch for each of its modules, not at every call of a device function too."""
    patched: set[tuple[bool, bool]] = set()

    def patch_once(fn):
        seen = fn.__globals__.values()
        modules = any(x is tl for x in seen), any(x is tl.core for x in seen)
        if modules in patched:
            return ALREADY_PATCHED
        patched.add(modules)
        return patch_lang(fn)

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    return patch_once, launch_afresh
