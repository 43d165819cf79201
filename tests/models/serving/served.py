"""A tiny Lizard behind transformers' own server, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from readable import byte_tokenizer
from tiny import student

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROOT = Path(__file__).parents[3]


def save_lizard(folder: Path, **changes) -> Path:
    """A random Lizard that chats, as a folder."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    student(vocab_size=len(tokenizer), max_position_embeddings=4096, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server(model: Path, *options: str, log: Path, seconds: float = 120) -> Iterator[str]:
    """The base URL of ``lizard-attn serve model`` for as long as the block runs. What it says goes into ``log``."""
    port = free_port()
    command = [sys.executable, "-m", "lizard_models", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as said:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "float32", *options],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, seconds, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def wait_for(url: str, process: subprocess.Popen, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise AssertionError(f"the server ended: {log.read_text()}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            if urllib.request.urlopen(url, timeout=5).status == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"no server at {url} after {seconds} s")
