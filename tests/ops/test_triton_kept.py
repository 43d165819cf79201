"""The kernels of keys with an expiry against the reference, in the interpreter without a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch
from kernel_checks import DEVICE, check_against_naive
from test_triton_hybrid import EXP, MERGE, SUM, make, run

from lizard_ops import chunk_hybrid_attn, naive_hybrid_attn, naive_key_expiry

pytest.importorskip("lizard_ops.hybrid_attn.triton.kept_chunk")

OUTSIDE = {"coverage": "outside"}
IDENTITY = {"feature_map": "identity"}


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    """So that short sequences meet the boundaries of a long one."""
    monkeypatch.setattr(importlib.import_module("lizard_ops.hybrid_attn.triton.kept_index"), "SEGMENT", 32)


def expiry_of(x, window, anchors, places, rows=None, seed=0):
    """Of scores with ties among them."""
    scores = torch.randn(x["k"].shape[:3], generator=torch.Generator().manual_seed(seed)).round()
    return naive_key_expiry(scores.to(DEVICE), window, anchors, places, **(rows or {})).expiry


def check(x, window, places, dtype=torch.float32, expiry=None, anchors=0, rows=None, **options):
    x = {name: t.to(DEVICE) for name, t in x.items()}
    expiry = expiry_of(x, window, anchors, places, rows) if expiry is None else expiry
    options |= {"anchors": anchors, "rows": rows}

    def fast(*args, **more):
        return chunk_hybrid_attn(*args, expiry=expiry, kept_keys=places, impl="triton", **more)

    def naive(*args, **more):
        return naive_hybrid_attn(*args, expiry=expiry, **more)

    check_against_naive(
        lambda x: run(fast, x, window, **options), lambda x: run(naive, x, window, **options), x, dtype
    )  # fmt: skip
