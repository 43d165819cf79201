"""A process that has the large libraries imported, and runs pytest in a fork of itself for each request.

It reads a line of JSON, {"tree": folder, "arguments": [...], "seconds": limit}, and writes one: {"code": exit code or
None past the limit, "said": output}. None of the modules that tests are asked about is imported before the fork.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
from typing import Any

from benchmarks import forks

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
        child = forks.start(lambda: run(tree, arguments), output.fileno(), tree)
        code = forks.end(child, seconds).code  # and with it what the tests left running
        output.seek(0)
        return {"code": None if code == forks.HANGS else code, "said": output.read().decode(errors="replace")}


def run(tree: str, arguments: list[str]) -> int:
    """The child."""
    sys.path.insert(0, tree)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [tree, os.environ.get("PYTHONPATH")]))
    import pytest

    return int(pytest.main(arguments))


if __name__ == "__main__":
    main()
