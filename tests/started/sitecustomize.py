"""Python processes that tests start do without two packages that are imported wherever they are installed.

peft and transformers import them for layers that these processes have none of: a third of what starting takes.
"""

import sys

for name in ("bitsandbytes", "torchao"):
    sys.modules[name] = None
