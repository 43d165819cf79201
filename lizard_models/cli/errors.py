"""Errors as one line that names the argument and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand

FULL_DISK = ("No space left on device", "os error 28", "PytorchStreamWriter failed", "unexpected pos")


RUNNING: ContextVar[dict[str, str]] = ContextVar("RUNNING", default={})  # noqa: B039  options by parameter, never changed


class Command(TyperCommand):
    """A command whose errors know its options: ``app.command(cls=Command)``."""

    def invoke(self, context: Any) -> Any:
        options = {p.name: max(p.opts, key=len) for p in self.params if p.name and p.param_type_name == "option"}
        token = RUNNING.set(options)
        try:
            return super().invoke(context)
        finally:
            RUNNING.reset(token)


@contextlib.contextmanager
def one_line_errors(go_on: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Ends the command with one line on stderr for what a user can mend, and for Ctrl-C.

    go_on: called then, gives the command that takes up the work again, or None if there is nothing to take up.
    Exit codes: 2 for bad input and full disks or memory, 130 for Ctrl-C. Any other error is a fault of ours and keeps
    its traceback, as does everything if $LIZARD_TRACEBACK is set.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        what = str(interrupt) or "stopped"
        again = f"; go on with: {command}" if (command := go_on()) else ""
        _stop(f"{what}; nothing half-written is left{again}", 130)
    except Exception as error:
        line = explanation(error)
        if line is None or os.environ.get("LIZARD_TRACEBACK"):
            raise
        full = is_full_disk(error) and type(error).__name__ != "KeptDraft"
        again = f"; then go on with: {command}" if full and (command := go_on()) else ""
        _stop(f"error: {with_options(line)}{again}", 2, everywhere=not isinstance(error, ValueError))


def with_options(text: str) -> str:
    """An error of the library in the words of the command line: its arguments as the running command's options.

    An argument is what stands before the first colon, between backquotes, ``name=True``, or a name with an underscore.
    """
    options = RUNNING.get()
    start, colon, rest = text.partition(":")
    text = f"{options.get(start.replace(' ', '_'), start)}{colon}{rest}"
    for name, option in options.items():
        text = text.replace(f"`{name}`", option)
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}=True\b", option, text)
        if "_" in name:
            text = re.sub(rf"(?<![\w./'-]){re.escape(name)}(?![\w./=])", option, text)
    return text


def is_full_disk(error: BaseException) -> bool:
    """Whether an error of the system, torch or safetensors says that the disk is full."""
    return getattr(error, "errno", None) == errno.ENOSPC or any(text in str(error) for text in FULL_DISK)


def explanation(error: Exception) -> str | None:
    """One line for an error that the user can mend, None for any other."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "KeptDraft":
        return text  # where the work is matters more than why it is not elsewhere
    if is_full_disk(error):
        return "the disk is full: free some space, or start again with --out (and --cache) on another disk"
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU is out of memory: give a smaller --micro-batch-size or --seq-len, or --gradient-checkpointing"
    if type(error).__name__ == "SafetensorError":
        return f"a file of weights is damaged or cut short ({text}): fetch or copy the model again"
    if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError | FileNotFoundError):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | FloatingPointError):
        return text
    return None


def _stop(message: str, code: int, everywhere: bool = False) -> None:
    """everywhere: each process of several speaks, because only one may have failed; else the main one alone."""
    process = os.environ.get("RANK", "0")
    if process == "0" or everywhere:
        start = "" if process == "0" else f"process {process}: "
        Console(stderr=True, soft_wrap=True, highlight=False).print(start + message, markup=False)
    raise typer.Exit(code)
