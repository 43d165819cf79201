"""What the conformance suite says of a run, which must hold without a checkout of transformers too."""

from __future__ import annotations

import unittest

import pytest
from listed import Failing
from must_fail import must_fail
from table import outcomes, rows
from transformers_checkout import VARIABLE, checkout

ENTRY = Failing("test_a", "ValueError: no such .*", "a reason", "Llama* Qwen2")


def raising(error: Exception):
    def test() -> None:
        raise error

    return test


def test_a_listed_test_must_fail_as_it_says():
    with pytest.raises(pytest.xfail.Exception, match="a reason"):
        must_fail(raising(ValueError("no such thing")), ENTRY)
    with pytest.raises(pytest.fail.Exception, match="it passes"):
        must_fail(lambda: None, ENTRY)
    with pytest.raises(pytest.fail.Exception, match=r"skips it \(no GPU\)"):
        must_fail(raising(unittest.SkipTest("no GPU")), ENTRY)
    with pytest.raises(KeyError):
        must_fail(raising(KeyError("no such thing")), ENTRY)
    held = [
        (v, t) for v in ("Llama", "LlamaWide", "Qwen2", "Qwen3") for t in ("test_a", "test_ab") if ENTRY.holds(v, t)
    ]
    assert held == [("Llama", "test_a"), ("LlamaWide", "test_a"), ("Qwen2", "test_a")]


def test_a_checkout_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert checkout() is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=r"has no tests/causal_lm_tester\.py.*wanted the root of a checkout"):
        checkout()


def test_counts_are_those_of_the_run(tmp_path):
    (tmp_path / "test_run.py").write_text(
        "import pytest, unittest\n"
        "class SomeTest(unittest.TestCase):\n"
        "    def test_a(self): pass\n"
        "    def test_b(self): self.fail()\n"
        "    def test_c(self): self.skipTest('not here')\n"
        "    def test_d(self): pytest.xfail('listed')\n"
        "    def test_e(self):\n"
        "        with self.subTest('one'): pass\n"
        "        with self.subTest('two'): self.fail()\n"
        "def test_beside(): pass\n"
    )
    file = tmp_path / "run.xml"
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest.main(["-q", *plugins, "--rootdir", str(tmp_path), f"--junitxml={file}", str(tmp_path)])
    found = outcomes([file])
    assert found == {
        "SomeTest": {
            "test_a": "passed",
            "test_b": "failed",
            "test_c": "skipped",
            "test_d": "listed",
            "test_e": "failed",
        }
    }
    llama = {"test_a": "passed", "test_b": "passed", "test_c": "skipped"}
    table = rows({"LlamaTest": found["SomeTest"], "LlamaModelTest": llama})
    assert list(table)[2:] == [
        "| transformers' Llama | 3 | 2 | 0 | 0 | 1 | 2 |",
        "| Lizard Llama | 5 | 1 | 2 | 1 | 1 | 1 |",
    ]
