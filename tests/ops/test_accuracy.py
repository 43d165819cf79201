"""Errors at the chunk sizes of practice: at most twice those of the reference in the same dtype."""

from __future__ import annotations

import pytest
import torch
from op_cases import call, cases
from op_checks import examples, judge, with_gradients

SIZES = {"B": 1, "Hk": 1, "G": 3, "K": 64, "V": 64, "Fp": 32, "window": 64, "chunk_size": None, "anchors": 4}
SIZES |= {"scale": None}
CASES = [
    ("gated", {"gate": "key", "normalize": True, "offset": 0, "decay": 0.02}),
    ("gated", {"gate": "channel", "normalize": False, "offset": 0, "decay": 0.02}),
    ("window", {"sinks": True}),
    ("hybrid", {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "gate": "key", "decay": 0.02}),
    ("hybrid", {"mix": "sum", "coverage": "all", "feature_map": "exp", "gate": "token", "weight": "head"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op, options", CASES)
def test_errors_are_those_of_the_dtype(op, options, dtype, request):
    device = request.config.getoption("--device")

    @examples(1, cases(op, T=193, **SIZES, **options))
    def check(case):
        case = case.cast(dtype)
        judge(with_gradients(lambda c: call(c, "chunk"), case.cast(dtype, device)), case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "op, form",
    [("gated", "chunk"), ("gated", "recurrent"), ("window", "chunk"), ("hybrid", "chunk"), ("hybrid", "recurrent")],
)
def test_half_precision_is_rounded_once(op, form, dtype):
    """PyTorch computes in float32: of the same numbers it puts out the same, rounded to the dtype of the inputs."""

    @examples(3, cases(op))
    def check(case):
        case = case.cast(dtype)
        wide = case.map(lambda _, x: x.float(), weights=True)
        found, exact = call(case, form), call(wide, form)
        assert found.keys() == exact.keys() and found["o"].dtype == dtype
        for name, x in exact.items():
            assert torch.equal(found[name], x.to(found[name].dtype)), name
