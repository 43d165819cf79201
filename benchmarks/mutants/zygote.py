"""A process that has the large libraries imported, and runs pytest in a fork of itself for each request.

It reads a line of JSON, {"tree": folder, "arguments": [...], "seconds": limit}, and writes one: {"code": exit code or
None past the limit, "said": output}. None of the project's own modules are imported before the fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from typing import Any

LIBRARIES = (
    "torch", "torch._dynamo", "triton", "hypothesis", "pytest", "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.smollm3.modeling_smollm3",
    "transformers.models.gemma2.modeling_gemma2", "transformers.models.gemma3.modeling_gemma3",
    "transformers.trainer", "peft", "datasets", "typer", "rich",
)  # fmt: skip


def main() -> None:
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


def answer(tree: str, arguments: list[str], seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            run(tree, arguments, output.fileno())
        until, code = time.monotonic() + seconds, None
        while code is None and time.monotonic() < until:
            found, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if found else None
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests left running too
        if code is None:
            os.waitpid(child, 0)
        output.seek(0)
        return {"code": code, "said": output.read().decode(errors="replace")}


def run(tree: str, arguments: list[str], output: int) -> None:
    """The child: a session of its own, so that all of it can be ended."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    sys.path.insert(0, tree)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [tree, os.environ.get("PYTHONPATH")]))
    import pytest

    code = 3
    try:
        code = pytest.main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))


if __name__ == "__main__":
    main()
