"""A server in a process of its own, that can be killed and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil


class Server:
    """``command`` with a free port put where it says PORT, on this machine alone. What it says goes into ``log``."""

    def __init__(self, command: list[str], log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [part.replace("PORT", str(self.port)) for part in command]
        self.log, self.process = log, None
        self.resident = 0  # bytes, the most that was seen

    def start(self, seconds: float = 300) -> float:
        """Starts it and waits until it answers; returns how long that took."""
        began = time.monotonic()
        with self.log.open("a") as said:
            self.process = subprocess.Popen(
                self.command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        while time.monotonic() - began < seconds:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}, see {self.log}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                if urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200:
                    return time.monotonic() - began
            time.sleep(0.1)
        raise RuntimeError(f"the server does not answer after {seconds} s, see {self.log}")

    def kill(self) -> None:
        """Ends it and its children at once, as a crash would."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group
        self.process.wait()

    def cpu(self) -> float:
        """Seconds of processor time of it and its children so far."""
        assert self.process is not None
        mine = psutil.Process(self.process.pid)
        spent = [p.cpu_times() for p in (mine, *mine.children(recursive=True))]
        return sum(times.user + times.system for times in spent)

    def measure(self) -> None:
        """Looks at its memory."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            mine = psutil.Process(self.process.pid)
            self.resident = max(self.resident, sum(p.memory_info().rss for p in (mine, *mine.children(recursive=True))))


def commands(kind: str, model: Path, extra: list[str]) -> list[str]:
    """How to serve ``model``: by "transformers" or by "vllm"."""
    if kind == "transformers":
        own = ["-m", "lizard_models", "serve", str(model), "--device", "cpu", "--dtype", "float32"]
    else:
        own = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32",
               "--enforce-eager", "--enable-prefix-caching"]  # fmt: skip
    return [sys.executable, *own, "--host", "127.0.0.1", "--port", "PORT", *extra]
