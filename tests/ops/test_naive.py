"""The references against their formulas over all pairs of positions at once, and on packed and padded rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import strategies as st
from op_cases import GATES, HYBRID, call, cases
from op_checks import examples

from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions, gated_arguments
from lizard_ops.gated_attn.formula import gated_formula
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments
from lizard_ops.hybrid_attn.formula import hybrid_formula
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions, window_arguments
from lizard_ops.window_attn.formula import window_formula

LENGTHS = (9, 5, 1)


def capped_cases(op, **fixed):
    """Cases with softcaps among them."""

    def more(case, softcap):
        return dataclasses.replace(case, options=case.options | {"softcap": softcap})

    return st.builds(more, cases(op, lengths=LENGTHS, **fixed), st.sampled_from([0.5, 3.0, None]))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [True, False])
def test_gated_is_its_formula(gate, normalize):
    @examples(12, cases("gated", lengths=LENGTHS, gate=gate, normalize=normalize))
    def check(case):
        o, log_mass = gated_formula(*gated_arguments(GatedInputs(**case.tokens), GatedOptions(**case.options)))
        found = call(case, "naive")
        torch.testing.assert_close(found["o"], o)
        if normalize:
            torch.testing.assert_close(found["log"], log_mass)


@pytest.mark.parametrize("anchors", [0, 1, 3])
@pytest.mark.parametrize("sinks", [True, False])
def test_window_is_its_formula(anchors, sinks):
    @examples(12, capped_cases("window", anchors=anchors, sinks=sinks))
    def check(case):
        inputs, options = WindowInputs(**case.tokens, **case.weights), WindowOptions(**case.options)
        o, lse, _ = window_formula(*window_arguments(inputs, options))
        found = call(case, "naive")
        torch.testing.assert_close(found["o"], o)
        torch.testing.assert_close(found["log"], lse)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("feature_map", HYBRID["feature_map"])
@pytest.mark.parametrize("coverage", HYBRID["coverage"])
@pytest.mark.parametrize("mix", HYBRID["mix"])
def test_hybrid_is_its_formula(mix, coverage, feature_map, gate):
    @examples(6, capped_cases("hybrid", mix=mix, coverage=coverage, feature_map=feature_map, gate=gate))
    def check(case):
        inputs, options = HybridInputs(**case.tokens, **case.weights), HybridOptions(**case.options)
        torch.testing.assert_close(call(case, "naive")["o"], hybrid_formula(*hybrid_arguments(inputs, options)))


@pytest.mark.parametrize("op", ["gated", "window", "hybrid"])
def test_packed_and_padded_rows_are_separate_sequences(op):
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()

    @examples(10, cases(op, B=2, T=9))
    def check(case):
        padded = call(case, "naive", padding_mask=mask)
        assert not padded["o"][~mask].any()
        for row in range(2):
            alone = call(case.part(slice(row, row + 1), mask[row]), "naive")
            for name, x in alone.items():
                whole = padded[name][row : row + 1]
                torch.testing.assert_close(whole if "state" in name else whole[:, mask[row]], x)
        one = case.part(slice(0, 1), slice(None))
        packed = call(one, "naive", cu_seqlens=torch.tensor([0, 4, 4, 9]))
        for n, piece in enumerate((slice(0, 4), slice(4, 4), slice(4, 9))):
            for name, x in call(one.part(slice(None), piece), "naive").items():
                torch.testing.assert_close(packed[name][n : n + 1] if "state" in name else packed[name][:, piece], x)
