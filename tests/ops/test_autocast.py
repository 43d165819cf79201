"""Under autocast the inputs of an op take its dtype and nothing else does."""

from __future__ import annotations

import pytest
import torch
from op_cases import call, cases
from op_checks import examples


@pytest.mark.parametrize(
    "op, form", [("gated", "chunk"), ("gated", "recurrent"), ("window", "chunk"), ("hybrid", "chunk")]
)
def test_autocast_is_a_cast_of_the_inputs(op, form, request):
    device = request.config.getoption("--device")

    chunk = {"chunk_size": None, "sink_form": "exp"} if device == "cuda" else {}  # what the kernels take

    @examples(5, cases(op, T=9, **chunk))
    def check(case):
        case = case.cast(torch.float32, device)
        cast = ("q", "k", "v", "fq", "fk")
        mixed = case.map(lambda name, x: x.bfloat16() if name == "v" else x)
        plain = call(case.map(lambda name, x: x.bfloat16() if name in cast else x), form)
        with torch.autocast(device, torch.bfloat16):
            found = call(mixed, form)
        assert found["o"].dtype == torch.bfloat16
        for name, x in plain.items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=0)
