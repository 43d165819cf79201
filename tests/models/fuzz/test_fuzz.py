"""Random calls of random models against the same texts alone: a short run, always the same one. See __main__.py."""

import pytest
from machine import CALLS
from planted import PLANTED
from run import run


def test_random_calls_are_those_of_the_texts_alone():
    before = CALLS["forwards"]
    run(examples=12, steps=20, number=4)
    assert CALLS["forwards"] - before > 40


def test_a_planted_fault_is_found(monkeypatch):
    PLANTED["padding_is_read"](monkeypatch)
    with pytest.raises(AssertionError):
        run(examples=12, steps=20, number=4, shrink=0)


@pytest.mark.parametrize("fault", PLANTED)
def test_every_fault_can_be_planted(monkeypatch, fault):
    """What it replaces is still there under that name."""
    PLANTED[fault](monkeypatch)
