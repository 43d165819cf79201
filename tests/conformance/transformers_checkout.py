"""Where transformers' own tests are: in no wheel, so in a checkout that the user names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "LIZARD_TRANSFORMERS_TESTS"
COMMAND = f"{VARIABLE}=CHECKOUT pytest tests/conformance"
WANTED = ("tests/causal_lm_tester.py", "tests/test_modeling_common.py", "tests/generation/test_utils.py")


def checkout() -> Path | None:
    """The root of the checkout, importable as ``tests`` from then on; None where the variable is not set.

    Raises ValueError for a folder without the tests.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    root = Path(given).resolve()
    if lacking := [name for name in WANTED if not (root / name).is_file()]:
        raise ValueError(
            f"{VARIABLE}={given} has no {', '.join(lacking)}: wanted the root of a checkout of transformers, at the "
            "release that is installed"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # ``tests`` here is no package, so theirs is found wherever it stands
    return root
