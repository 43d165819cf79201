"""Faults at the events of a file system: what a process opens to write, renames, removes, makes, syncs."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from transformers import PreTrainedTokenizerFast

WATCHED = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def watch(folder: Path, at_event: Callable[[int, str], None]) -> None:
    """Calls ``at_event(number, kind)`` before each event below ``folder`` in this process, numbered from 1.

    Python's audit events show them, and the writes of safetensors and of tokenizers, which Python does not see, are put
    beside them. What ``at_event`` raises is raised in place of the event. A process cannot be unwatched: call it in a
    fork.
    """
    count, inside, start = [0], [False], str(folder)

    def event(kind: str, path: Any) -> None:
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if inside[0] or not name.startswith(start):
            return
        inside[0] = True
        try:
            count[0] += 1
            at_event(count[0], f"{kind} {name[len(start) + 1 :]}")
        finally:
            inside[0] = False

    def audit(name: str, arguments: tuple) -> None:
        if name == "open" and len(arguments) == 3:
            mode, flags = arguments[1], arguments[2]
            writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & os.O_ACCMODE)
            if writes:
                event("open", arguments[0])
        elif name in WATCHED:
            event(name, arguments[1] if name == "os.rename" else arguments[0])

    plain_save, plain_sync = safetensors.torch.serialize_file, os.fsync
    plain_tokenizer = PreTrainedTokenizerFast._save_pretrained

    def save(tensors: Any, filename: Any, **options: Any) -> None:
        event("save", filename)
        plain_save(tensors, filename, **options)
        event("saved", filename)

    def save_tokenizer(self: Any, save_directory: Any, *more: Any, **options: Any) -> Any:
        event("save", f"{save_directory}/tokenizer.json")
        names = plain_tokenizer(self, save_directory, *more, **options)
        event("saved", f"{save_directory}/tokenizer.json")
        return names

    def sync(descriptor: int) -> None:
        event("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        plain_sync(descriptor)

    safetensors.torch.serialize_file = save
    PreTrainedTokenizerFast._save_pretrained = save_tokenizer
    os.fsync = sync
    sys.addaudithook(audit)


def kill_at(folder: Path, number: int) -> Callable[[], None]:
    """SIGKILL in front of that event. This and the others here give what the process must call that has the fault."""
    return partial(_kill_at, folder, number)


def full_at(folder: Path, number: int) -> Callable[[], None]:
    """From that event on, the disk is full: nothing new can be opened to write, made or synced; removing works."""
    return partial(_full_at, folder, number)


def cut_at(folder: Path, number: int, size: int) -> Callable[[], None]:
    """From that event on, no file gets more than ``size`` bytes: writes end in the middle, with an error."""
    return partial(_cut_at, folder, number, size)


def list_into(folder: Path, file: Path) -> Callable[[], None]:
    """Writes the kind of each event into a file."""
    return partial(_list_into, folder, file)


def _kill_at(folder: Path, number: int) -> None:
    watch(folder, lambda n, kind: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)


def _full_at(folder: Path, number: int) -> None:
    def full(n: int, kind: str) -> None:
        if n >= number and kind.split()[0] in ("open", "save", "os.mkdir", "sync"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), kind.split(" ", 1)[1])

    watch(folder, full)


def _cut_at(folder: Path, number: int, size: int) -> None:
    def cut(n: int, kind: str) -> None:
        if n == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    watch(folder, cut)


def _list_into(folder: Path, file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    watch(folder, lambda n, kind: (os.write(descriptor, f"{kind}\n".encode()), None)[1])
