"""Soft-capped window scores, as Gemma 2 has them: every form is the reference, and the reference is the formula.

The Triton kernels with a cap are among the cases of test_triton_window.py, test_triton_hybrid.py and
test_triton_decode.py.
"""

import dataclasses

import pytest
import torch
from op_cases import call, cases, state_in
from op_checks import examples, judge, with_gradients

from lizard_ops import chunk_hybrid_attn, naive_hybrid_attn, naive_window_attn, recurrent_hybrid_attn, window_attn


def capped(case, dtype):
    """The case with a cap that its scores reach, queries made larger."""
    case = case.map(lambda name, x: 4 * x if name == "q" else x).cast(dtype)
    return dataclasses.replace(case, options=case.options | {"softcap": 1.5})


def test_the_reference_is_the_formula():
    @examples(10, cases("window", lengths=(9, 5, 1), G=1, sinks=False))
    def check(case):
        case = capped(case, torch.float64)
        q, k, v = (case.tokens[name] for name in "qkv")
        i, j = torch.arange(case.length)[:, None], torch.arange(case.length)
        seen = (j <= i) & ((j > i - case.options["window"]) | (j < case.options["anchors"]))
        scale = case.options["scale"] or q.shape[3] ** -0.5
        s = 1.5 * (scale * torch.einsum("bihd,bjhd->bhij", q, k) / 1.5).tanh()
        weights = s.masked_fill(~seen, -torch.inf).softmax(-1)
        torch.testing.assert_close(call(case, "naive")["o"], torch.einsum("bhij,bjhv->bihv", weights, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["window", "hybrid"])
def test_every_form_is_the_reference(op, dtype):
    @examples(8, cases(op))
    def check(case):
        case = capped(case, dtype)
        judge(with_gradients(lambda c: call(c, "chunk"), case), case, dtype)
        if op == "hybrid":
            judge(call(case, "recurrent"), case, dtype)

    @examples(4, cases(op, lengths=(13,)))
    def segments(case):
        case = capped(case, dtype)
        first = call(case.part(slice(None), slice(0, 6)), "chunk")
        second = call(case.part(slice(None), slice(6, 13)), "chunk", state_in(first))
        both = second | {"o": torch.cat([first["o"], second["o"]], 1)}
        both.pop("log", None)
        judge(both, case, dtype, lambda c: {name: x for name, x in call(c, "naive").items() if name != "log"})


WINDOW = (window_attn, naive_window_attn)


@pytest.mark.parametrize("form", [*WINDOW, chunk_hybrid_attn, recurrent_hybrid_attn, naive_hybrid_attn])
def test_what_cannot_be_capped_says_so(form):
    q = torch.ones(1, 1, 1, 2)
    rest = [q, q] if form in WINDOW else [q, q, q, q, None]
    for wrong in (0.0, -1.0, float("inf"), "50"):
        with pytest.raises(ValueError, match=f"softcap: got {wrong!r}.*a positive finite number or None"):
            form(q, *rest, 2, softcap=wrong)
