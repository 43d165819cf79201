"""Kept keys and the state that holds them: pieces of any size agree with one pass of the reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import strategies as st
from op_cases import GATES, HYBRID, call, cases
from op_checks import examples, judge
from target_cases import in_segments

SMALL = (
    ("gated_attn.chunk_torch", "HEAD_GATE_CHUNK", 8),
    ("gated_attn.chunk_torch", "CHANNEL_GATE_CHUNK", 4),
    ("gated_attn.chunk_torch_tiles", "SCAN", 2),
    ("window_attn.chunk_torch", "BLOCK", 2),
    ("key_expiry.chunk_torch", "TILE", 4),
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that short sequences meet every boundary."""
    for module, name, size in SMALL:
        monkeypatch.setattr(importlib.import_module(f"lizard_ops.{module}"), name, size)


def scored(case, seed=0):
    """The case with scores, ties among them, and infinities."""
    x = torch.randn(case.tokens["k"].shape[:3], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.where(x > 1.5, torch.inf, torch.where(x < -1.5, -torch.inf, x.round()))
    case.tokens["scores"] = x
    return case


@st.composite
def scored_cases(draw, lengths=(29, 17, 9, 5, 1, 0), **fixed):
    """(case, kept_keys and score_delay)."""
    case = scored(draw(cases("hybrid", lengths=lengths, **({"decay": 0.5} | fixed))), draw(st.integers(0, 9)))
    delay = min(draw(st.sampled_from((0, 2, 1))), case.options["window"] - 1)
    return case, {"kept_keys": draw(st.sampled_from((3, 1, 7, 40))), "score_delay": delay}


def in_order(outputs):
    """Kept keys in the order of their positions, empty places last."""
    held = outputs["state.kept_positions"]
    order = torch.where(held < 0, 2**62, held).argsort(dim=1, stable=True)
    for name in [name for name in outputs if name.startswith("state.kept_")]:
        x = outputs[name]
        index = order.repeat_interleave(x.shape[2] // order.shape[2], 2)
        outputs[name] = x.gather(1, index.view(*index.shape, *[1] * (x.ndim - 3)).expand_as(x))
    return outputs


CUTS = st.lists(st.integers(0, 29), min_size=1, max_size=3)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("coverage", HYBRID["coverage"])
@pytest.mark.parametrize("form", ["naive", "chunk"])
def test_pieces_are_the_whole(form, coverage, gate):
    """Outputs, and every field of the state."""

    @examples(6 if coverage == "outside" else 3, scored_cases(coverage=coverage, gate=gate), CUTS)
    def check(drawn, cuts):
        case, more = drawn
        pieces = in_segments(case, cuts, lambda part, state: call(part, form, state, **more))
        for found in (pieces, call(case, "chunk", **more)):
            judge(in_order(found), case, torch.float64, lambda c: call(c, "naive", **more))
