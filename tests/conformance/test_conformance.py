"""transformers' own tests of models and of generation, on Lizard models.

They are not in the wheel: give the root of a checkout in LIZARD_TRANSFORMERS_TESTS. docs/trust.md has the counts.
"""

from __future__ import annotations

import functools
import unittest
from typing import Any

import pytest
from transformers_checkout import COMMAND, VARIABLE, checkout

if checkout() is None:
    pytest.skip(f"{VARIABLE} is not set: {COMMAND}", allow_module_level=True)

import lizard_case
from listed import FAILING, NO_MATRICES, OVERRIDDEN, Failing, fnmatch
from must_fail import must_fail
from variants import VARIANTS, Variant

from lizard_models.model.families import FAMILIES, load_family

pytestmark = pytest.mark.timeout(1200)  # some of them compile
TESTS = [name for name in dir(lizard_case.LizardCase) if name.startswith("test_")]


def failing_test(name: str, entry: Failing) -> Any:
    """The test of transformers, expected to fail."""

    def run(self: Any) -> None:
        must_fail(getattr(super(type(self), self), name), entry)

    return functools.wraps(getattr(lizard_case.LizardCase, name))(run)


def case_of(name: str, variant: Variant) -> type:
    causal_lm = load_family(variant.family)
    classes = {
        "variant": variant,
        "base_model_class": causal_lm.decoder_class,
        "causal_lm_class": causal_lm,
        "config_class": causal_lm.config_class,
    }
    members = {
        "__module__": __name__,
        "model_tester_class": type(f"{name}Tester", (lizard_case.LizardTester,), classes),
        "_torch_compile_train_cls": causal_lm,
    }
    failing = {test: failing_test(test, entry) for entry in FAILING for test in TESTS if entry.holds(name, test)}
    return type(f"{name}Test", (lizard_case.LizardCase, unittest.TestCase), members | failing)


globals().update({f"{name}Test": case_of(name, variant) for name, variant in VARIANTS.items()})


def test_every_family_is_here_and_every_listed_test_exists():
    assert {variant.family for variant in VARIANTS.values()} == set(FAMILIES)
    stale = [entry.tests for entry in FAILING if not any(entry.holds(v, test) for v in VARIANTS for test in TESTS)]
    stale += [pattern for pattern in NO_MATRICES if not any(fnmatch(test, pattern) for test in TESTS)]
    assert not stale
    own = {
        name
        for replaced in (lizard_case.LizardCase, lizard_case.LizardTester)
        for name, member in vars(replaced).items()
        if getattr(member, "__module__", "") == "lizard_case" and name != "__init__"
    }
    assert own == set(OVERRIDDEN)
