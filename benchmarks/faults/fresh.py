"""``python -m benchmarks.faults.fresh FAULT WORDS...``: ``lizard-attn WORDS`` with a pickled fault."""

import pickle
import runpy
import sys

if __name__ == "__main__":
    pickle.loads(bytes.fromhex(sys.argv.pop(1)))()
    runpy.run_module("lizard_models", run_name="__main__", alter_sys=True)
