"""Peak memory of a layer's training step: which buffers are alive together, counted with kernels that do nothing."""

from __future__ import annotations

import pytest
import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from triton.runtime.interpreter import InterpretedFunction

from lizard_ops import chunk_hybrid_attn, project_heads

B, T, HQ, HK, D, FP = 2, 4096, 8, 2, 64, 32
CHUNK = 128  # linear rows a stored state
QUERIES, KEYS, STATES, STATISTIC = 2 * HQ * D, 2 * HK * D, 2 * HK * 2 * FP * D // CHUNK, 4 * HQ  # bytes a token
FEATURES = 2 * (HQ + HK) * FP


def allocations(nodes) -> list[tuple[int, int]]:
    """(time, bytes) of every allocation, bytes below zero where one ends."""
    found = []
    for node in nodes:
        if node.tag == _EventType.Allocation:
            found.append((node.start_time_ns, node.extra_fields.alloc_size))
        found += allocations(node.children)
    return found


def peak_bytes(call) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    now = peak = 0
    for _, size in sorted(allocations(seen.profiler.kineto_results.experimental_event_tree()), key=lambda x: x[0]):
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts a CPU's allocations; kernels run on the GPU here")
@pytest.mark.parametrize(
    "choices, largest",
    [
        # dq, the last to come: output, gradients, features, four statistics of the forward and three of the backward
        ({"mix": "merge", "coverage": "outside"}, 2 * QUERIES + 2 * KEYS + 2 * FEATURES + 7 * STATISTIC),
        # dfk: dq is there already, dk is not yet, but states and their gradients are
        ({"mix": "sum", "coverage": "all"}, 2 * QUERIES + KEYS + 2 * FEATURES + 2 * STATES + 8 * STATISTIC),
    ],
)
def test_peak_is_what_the_largest_step_needs(choices, largest, monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: None)
    make = {"dtype": torch.bfloat16}
    q, grad = (torch.zeros(B, T, HQ, D, **make) for _ in range(2))
    k, v = (torch.zeros(B, T, HK, D, **make) for _ in range(2))
    g, maps = torch.zeros(B, T, HK), [torch.zeros(heads, D, FP) for heads in (HQ, HK)]
    inputs = [x.requires_grad_() for x in (q, k, v, g, *maps)]

    def train():
        (same_q, fq), (same_k, fk) = (
            project_heads(x, weight, reuse_gradient=True, impl="triton") for x, weight in ((q, maps[0]), (k, maps[1]))
        )
        o, _ = chunk_hybrid_attn(
            same_q, same_k, v, fq, fk, g, 128, anchors=4, feature_map="softmax", impl="triton", **choices
        )
        torch.autograd.grad(o, inputs, grad)

    train()
    found = peak_bytes(train) / (B * T)
    assert found <= 1.03 * largest, f"{found:.0f} bytes a token, the largest step needs {largest}"
