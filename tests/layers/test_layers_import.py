"""The layers are for any architecture: they import where transformers is not installed."""

import subprocess
import sys

PROBE = """
import sys
for name in ("transformers", "peft", "accelerate", "datasets"):
    sys.modules[name] = None  # importing it fails
import lizard_layers
lizard_layers.HybridAttention
assert not [name for name in sys.modules if name.startswith("lizard_models")]
"""


def test_the_layers_need_no_transformers():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
