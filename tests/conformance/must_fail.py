"""Running a test that is listed as failing."""

from __future__ import annotations

import re
import unittest
from collections.abc import Callable

import pytest
from listed import Failing


def must_fail(test: Callable[[], None], entry: Failing) -> None:
    """Expected to fail as the entry says; that it passes, is skipped or fails in another way is an error."""
    try:
        test()
    except unittest.SkipTest as skip:
        pytest.fail(f"listed, but transformers skips it ({skip}): take it out of listed.py")
    except Exception as error:
        if not re.search(entry.message, f"{type(error).__name__}: {error}"):
            raise
        pytest.xfail(entry.reason)
    pytest.fail("listed, but it passes: take it out of listed.py")
