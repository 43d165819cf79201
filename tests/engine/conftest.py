"""vLLM's newer model runner, which GPUs get, on a CPU: ``VLLM_USE_V2_MODEL_RUNNER=1 pytest tests/engine``."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"

if V2 and importlib.util.find_spec("vllm"):
    # Its own kernels are Triton's. vLLM takes Triton on a CPU where it has a compiler for it; here they are interpreted
    # (tests/conftest.py), and no compiler is asked.
    from triton.backends import backends

    backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None))
