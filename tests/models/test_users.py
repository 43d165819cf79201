"""Every row of docs/users.md, on each of its models."""

from pathlib import Path

import pytest
import torch
from users import MODELS, ROWS, matches, outcome, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "users.md"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.check.__name__)
def test_what_the_table_says_is_seen(row, name):
    torch._dynamo.reset()
    expected, seen = getattr(row, name), outcome(row, name)
    assert matches(expected, seen), f"{row.what}: expected {expected!r}, saw {seen!r}"


def test_the_document_is_the_table():
    assert DOCUMENT.read_text() == table(), "write it again: python tests/models/users.py > docs/users.md"
