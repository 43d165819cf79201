"""Errors at the chunk sizes of practice: at most twice those of the reference in the same dtype."""

from __future__ import annotations

import pytest
import torch
from op_cases import call, cases
from op_checks import examples, judge, with_gradients

SIZES = {"B": 1, "Hk": 1, "G": 3, "K": 64, "V": 64, "Fp": 32, "window": 64, "chunk_size": None, "anchors": 4}
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
