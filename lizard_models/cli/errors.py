"""Errors as one line that names the argument and the remedy."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import typer
from typer.core import TyperCommand

from lizard_models.files import signals
from lizard_models.files.streams import console

OS_ERROR = re.compile(r"\(os error (\d+)\)")
GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo", "Gloo", "Timed out waiting", "c10d")
FULL_DISK = ("No space left on device", "os error 28", "PytorchStreamWriter failed", "unexpected pos")


RUNNING: ContextVar[dict[str, str]] = ContextVar("RUNNING", default={})  # noqa: B039  options by parameter, never changed


class Command(TyperCommand):
    """A command whose errors know its options: ``app.command(cls=Command)``. ``--resume`` may have a value or none."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """As click's."""
        if any("--resume" in p.opts for p in self.params):
            args = [*_resumed(args)]
        return super().parse_args(context, args)

    def invoke(self, context: Any) -> Any:
        options = {p.name: max(p.opts, key=len) for p in self.params if p.name and p.param_type_name == "option"}
        token = RUNNING.set(options)
        try:
            return super().invoke(context)
        finally:
            RUNNING.reset(token)


class Stopped(KeyboardInterrupt):
    """A signal that asks the command to end, outside of training, where a step is finished first."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def one_line_errors(go_on: Callable[[], str] | None = None) -> Iterator[None]:
    """Ends the command with one line on stderr for what a user can mend, and for Ctrl-C, SIGTERM and SIGHUP.

    go_on: gives the command that takes up the work again, or begins it, where a signal or the system stopped it.
    Exit codes: 2 for bad input, full disks and what else the system refuses, 128 and its number for a signal (130 for
    Ctrl-C). Any other error is a fault of ours and keeps its traceback, as does everything if $LIZARD_TRACEBACK is set.
    """

    asked: list[int] = []

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        raise Stopped(number)

    handlers = signals.handle(stop)
    try:
        try:
            yield
        except BaseException:
            signals.ignore(handlers)  # how it ended is said to the end
            raise
    except KeyboardInterrupt as interrupt:
        _stopped(interrupt, go_on)
    except Exception as error:
        line = explanation(error)
        if line is None and asked and not os.environ.get("LIZARD_TRACEBACK"):
            _stopped(Stopped(asked[0]), go_on)  # an import that it broke off fails in other words
        if line is None or os.environ.get("LIZARD_TRACEBACK"):
            if _several() and hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note(f"process {os.environ.get('RANK', '0')} of {os.environ['WORLD_SIZE']}")
            raise
        again = f"; then go on with: {go_on()}" if go_on and is_of_the_system(error) else ""
        _stop(f"error: {with_options(line)}{again}", 2)
    finally:
        signals.restore(handlers)


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


def is_of_the_system(error: BaseException) -> bool:
    """Whether the machine refused, and not the command was wrong: it can be repeated when that is mended."""
    refused = isinstance(error, OSError | MemoryError) or is_full_disk(error) or refused_by(error) is not None
    refused = refused or is_of_another_process(error)
    return type(error).__name__ != "KeptDraft" and refused


def is_of_another_process(error: BaseException) -> bool:
    """Whether torch says that another process of several, which this one exchanged numbers with, is gone."""
    return _several() and isinstance(error, RuntimeError) and any(text in str(error) for text in GONE)


def refused_by(error: BaseException) -> str | None:
    """What the system said where safetensors or tokenizers could not read or write, None for another error."""
    theirs = type(error) is Exception or type(error).__name__ == "SafetensorError"
    number = OS_ERROR.search(str(error)) if theirs else None
    return os.strerror(int(number[1])) if number else None


def explanation(error: Exception) -> str | None:
    """One line for an error that the user can mend, None for any other."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "KeptDraft":
        return text  # where the work is matters more than why it is not elsewhere
    if is_full_disk(error):
        return "the disk is full: free some space, or start again with --out (and --cache) on another disk"
    if is_of_another_process(error):
        return f"another process of this run has gone, and its part of the step with it ({text[:200]})"
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU is out of memory: give a smaller --micro-batch-size or --seq-len, or --gradient-checkpointing"
    if isinstance(error, MemoryError):
        return "the machine is out of memory: give a smaller --micro-batch-size or --seq-len, or a smaller model"
    if reason := refused_by(error):
        return f"a file of {'the tokenizer' if type(error) is Exception else 'weights'}: {reason}"
    if type(error).__name__ == "SafetensorError":
        return f"a file of weights is damaged or cut short ({text}): fetch or copy the model again"
    if isinstance(error, BrokenPipeError):
        return None  # whoever read the output has gone, and needs no word
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else text
    if isinstance(error, ValueError | FloatingPointError):
        return text
    return None


def _says_first(message: str, signal: bool) -> bool:
    from lizard_models.distill.parallel import first_to_say

    return first_to_say(message, signal)


def _resumed(args: list[str]) -> Iterator[str]:
    """Arguments in which ``--resume`` always has a value."""
    left = iter(args)
    for argument in left:
        if argument != "--resume":
            yield argument
            continue
        value = next(left, None)
        yield "--resume=auto" if value == "auto" else "--resume=yes"
        if value not in (None, "auto"):
            yield value


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _stopped(interrupt: KeyboardInterrupt, go_on: Callable[[], str] | None) -> None:
    """Ends the command as a signal asks it to. ``go_on`` may need a module whose import was broken off."""
    again = ""
    if go_on is not None:
        try:
            again = f"; go on with: {go_on()}"
        except Exception:
            again = "; repeat the command to go on"
    what = str(interrupt) or "stopped"
    _stop(f"{what}; nothing half-written is left{again}", 128 + getattr(interrupt, "number", signal.SIGINT))


def _stop(message: str, code: int) -> None:
    """Of several processes each speaks that has something of its own to say."""
    process = os.environ.get("RANK", "0")
    if not _several() or _says_first(message, code > 128):
        start = "" if process == "0" else f"process {process}: "
        console("stderr", highlight=False).print(start + message, markup=False)
    raise typer.Exit(code)
