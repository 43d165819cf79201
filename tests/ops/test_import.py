"""What importing lizard_ops does, seen from a fresh process: almost nothing."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import os, sys, time
import torch
before, start = dict(os.environ), time.perf_counter()
modules = set(sys.modules)
import lizard_ops
seconds = time.perf_counter() - start
import json
print(json.dumps({
    "seconds": seconds,
    "environment": dict(os.environ) == before,
    "modules": sorted(set(sys.modules) - modules),
    "cuda": torch.cuda.is_initialized(),
    "threads": torch.get_num_threads(),
    "operators": [x for x in dir(torch.ops) if "lizard" in x],
}))
"""


def test_importing_the_ops_touches_nothing():
    found = json.loads(subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout)
    assert found["seconds"] < 1.0
    assert found["environment"] and not found["cuda"] and not found["operators"]
    roots = {name.split(".")[0] for name in found["modules"]}
    assert not roots & {"transformers", "lizard_models", "lizard_layers", "triton", "datasets", "peft"}
    assert not [name for name in found["modules"] if "triton" in name and name.startswith("lizard_ops")]
