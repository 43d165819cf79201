"""Standard output and error for runs that outlive the terminal, or the pipe, that they were started in."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from rich.console import Console


class Lasting:
    """``sys.stdout`` or ``sys.stderr`` of the moment, which a write never ends a run by.

    Once it cannot be written (a closed pipe, a terminal that is gone, a full disk), standard error says so, if it can,
    and what follows is lost.
    """

    def __init__(self, name: str) -> None:
        self.name, self.lost = name, False

    def write(self, text: str) -> int:
        """As a file's."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """As a file's."""
        self._try("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(sys, self.name), name)

    def _try(self, call: str, *arguments: str) -> None:
        if self.lost:
            return
        stream = getattr(sys, self.name)
        try:
            getattr(stream, call)(*arguments)
        except (OSError, ValueError) as error:  # ValueError: a closed file
            self.lost = True
            with contextlib.suppress(OSError, ValueError):  # else what is still buffered fails at the end
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
            if self.name != "stderr":
                told = f"note: standard output cannot be written any more ({error}); the run goes on without it"
                with contextlib.suppress(OSError, ValueError):
                    print(told, file=sys.stderr, flush=True)


def console(name: str = "stdout", **options: Any) -> Console:
    """A rich console on standard output or error (``stderr``) that never ends a run."""
    stream: Any = Lasting(name)
    return Console(file=stream, soft_wrap=True, **options)
