"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

Handlers = dict[signal.Signals, Any]


def stopping_signals() -> list[signal.Signals]:
    """Those that ask a run to stop: not SIGHUP where it is ignored, as under nohup, or where there is none."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [signal.Signals[name] for name in names]
    return [n for n in numbers if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def handle(handler: Callable[[int, Any], Any]) -> Handlers:
    """Gives them a handler, and returns those they had; only the main thread can, in another nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in stopping_signals()}


def ignore(handlers: Handlers) -> None:
    """Lets signals come to nothing."""
    for number in handlers:
        signal.signal(number, signal.SIG_IGN)


def restore(handlers: Handlers) -> None:
    """Gives them the handlers back that they had."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
