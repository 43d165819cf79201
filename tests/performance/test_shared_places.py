"""The benchmark of shared out places: its share-out, and that its ways are what they say."""

import collections

import pytest
import shared_places

from lizard_models import LizardConfig
from lizard_ops.hybrid_attn.triton import decode, decode_parts


def test_the_share_out_is_that_of_a_budget():
    table = shared_places.share_out(30, 3)
    heads = collections.Counter(n for layer in table for n in layer)
    assert heads == shared_places.LEVELS
    kept = LizardConfig.preset("recommended").attention.kept_keys
    assert sum(n * count for n, count in heads.items()) == 90 * kept == 90 * shared_places.EQUAL
    assert sum(map(max, table)) == pytest.approx(33_536, rel=0.01)  # of the share-out that was measured
    with pytest.raises(ValueError, match="layers: got 31"):
        shared_places.share_out(31, 3)


def test_steps_are_divided_as_the_columns_say(monkeypatch):
    launched = []

    def note(kernel, programs, *args, **constants):
        launched.append((kernel.fn.__name__, constants["PART"]))

    for module in (decode, decode_parts):
        monkeypatch.setattr(module, "launch_kernel", note)
    for name, value in {
        "DEVICE": "cpu",
        "SOME": ([600, 8, 0],),
        "EQUAL": 700,
        "COPIES": {2: 1},
    }.items():
        monkeypatch.setattr(shared_places, name, value)
    monkeypatch.setattr(shared_places, "share_out", lambda layers, heads: [[900, 0, 8], [16, 8, 0]])
    seen = {}

    def time(call, milliseconds, graph):
        launched.clear()
        call()
        return seen.setdefault(tuple(launched), len(seen) + 1.0)

    monkeypatch.setattr(shared_places, "median_ms", time)
    found = shared_places.time_layers(1, [2], [128])
    whole, part, small = ("hybrid_decode_kernel", 0), ("decode_parts_kernel", 256), ("decode_parts_kernel", 128)
    behind, behind_small = ("hybrid_decode_kernel", 256), ("hybrid_decode_kernel", 128)
    assert list(seen) == [
        (whole,) * 24, (part, behind) * 24,
        (whole,) * 30, (part, behind) * 30, (small, behind_small) * 30,
        (whole, whole), (part, behind, whole), (small, behind_small, whole),
    ]  # fmt: skip
    assert found["some"][0]["undivided"] == 1e3 / 24 and found["all"][1]["parts of 128"] == 8e3
    assert (decode_parts.UNDIVIDED, decode_parts.config_for.__name__) == (512, "config_for")
