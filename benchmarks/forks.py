"""Work in a fork of a process that has the large libraries imported, left with nothing else of that process."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HANGS = -signal.SIGALRM  # exit code of a process that was ended since it took too long
GRACE = 2.0  # seconds in which what a process started has to end after it
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class End(NamedTuple):
    """code: exit code, negative for the signal that killed it, HANGS. left: whether others of its session went on."""

    code: int
    left: bool


def start(work: Callable[[], int | None], said: int, folder: Path | str) -> int:
    """Begins ``work`` in a fork, and returns the id of its process, which is also that of its session.

    It has a working folder, standard input and output of its own, no other open file, the signals as a process that
    ``python`` starts from a terminal (a shell's ``nohup`` or ``&`` would have them ignored), a random state of its
    own, and at its end does what an interpreter does at its end. said: descriptor that takes its output.

    Raises RuntimeError if another thread of this process runs: it would be gone in the fork, with the locks it holds.
    """
    if threading.active_count() > 1:
        raise RuntimeError(f"other threads run: {[t.name for t in threading.enumerate()]}")
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        _signals()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
        os.chdir(folder)
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        code = _code(work)
    finally:
        os._exit(code)


def end(child: int, seconds: float) -> End:
    """Waits so long for a process that leads its session, as of ``start``, and ends what is left of that."""
    until, code = time.monotonic() + seconds, None
    try:
        while code is None and time.monotonic() < until:
            found, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if found else None
            if code is None:
                time.sleep(0.01)
        until = time.monotonic() + GRACE * (code is not None and code >= 0)
        while _signal(child, 0) and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        left = _signal(child, signal.SIGKILL)
        if code is None:
            os.waitpid(child, 0)
    return End(HANGS, False) if code is None else End(code, left and code >= 0)


def _signal(session: int, number: int) -> bool:
    """Whether anybody was there to get it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)
        return True
    return False


def _signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _code(work: Callable[[], int | None]) -> int:
    """The exit code that a Python process with this work has, after its handlers of the end have run."""
    try:
        code = int(work() or 0)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException as error:  # what it does not expect
        traceback.print_exc()
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code
