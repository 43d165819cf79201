"""The forms of each op that the properties go through on a GPU, and a few of them in Triton's interpreter.

Every option that a kernel is compiled for is fixed by a form, so that the number of compilations is bounded; lengths,
rows and values are drawn. Head dims and groups are gone through in test_gpu.py and test_triton_*.py.
"""

from __future__ import annotations

from typing import Any

SMALL = {"Hk": 2, "G": 3, "K": 5, "V": 8, "Fp": 4, "scale": None, "chunk_size": None}  # odd dims, padded to tiles
ROUND = SMALL | {"G": 4, "K": 16, "V": 16, "Fp": 8}  # nothing to pad

GATED: dict[str, dict[str, Any]] = {
    "none": SMALL | {"gate": None, "normalize": True, "offset": 0, "anchors": 3},
    "scalar": ROUND | {"gate": "token", "normalize": True, "offset": 0, "anchors": 0},
    "key_offset": SMALL | {"gate": "key", "normalize": True, "offset": 5, "anchors": 3},
    "query_unnormalised": SMALL | {"gate": "query", "normalize": False, "offset": 0, "anchors": 0},
    "channel": SMALL | {"gate": "channel", "normalize": True, "offset": 0, "anchors": 0},
    "channel_offset_unnormalised": ROUND | {"gate": "channel", "normalize": False, "offset": 5, "anchors": 1},
}
WINDOW: dict[str, dict[str, Any]] = {
    "plain": ROUND | {"window": 33, "anchors": 0, "sinks": False},
    "anchors_shared_sinks": SMALL | {"window": 9, "anchors": 1, "sinks": True, "sinks_a_head": False},
    "anchors_sinks_a_head": SMALL | {"window": 4, "anchors": 3, "sinks": True, "sinks_a_head": True},
}
MERGE = {"mix": "merge", "coverage": "outside", "feature_map": "softmax", "merge_mass": "relative", "sinks": False}
SUM = {"mix": "sum", "coverage": "all", "feature_map": "softmax", "merge_mass": "absolute", "normalize": True}
HYBRID: dict[str, dict[str, Any]] = {
    "merge_outside_key": ROUND | MERGE | {"gate": "key", "weight": "head", "window": 9, "anchors": 3},
    "merge_all_scalar_absolute": SMALL
    | MERGE
    | {"coverage": "all", "merge_mass": "absolute", "sinks": True, "sinks_a_head": False}
    | {"gate": "token", "weight": "token", "window": 4, "anchors": 1},
    "sum_all_query_sinks": SMALL
    | SUM
    | {"gate": "query", "weight": "head", "window": 33, "anchors": 0, "sinks": True, "sinks_a_head": True},
    "sum_identity_key": SMALL
    | SUM
    | {"feature_map": "identity", "gate": "key", "weight": None, "window": 4, "anchors": 1, "sinks": False},
    "sum_outside_identity_unnormalised": ROUND
    | SUM
    | {"coverage": "outside", "feature_map": "identity", "normalize": False, "gate": None, "weight": "token"}
    | {"window": 9, "anchors": 3, "sinks": False},
    "merge_channel": SMALL | MERGE | {"gate": "channel", "weight": None, "window": 9, "anchors": 3},
    "merge_exp_key": SMALL | MERGE | {"feature_map": "exp", "gate": "key", "weight": "head", "window": 4, "anchors": 3},
    "sum_outside_exp_query": ROUND
    | SUM
    | {"coverage": "outside", "feature_map": "exp", "gate": "query", "weight": "token"}
    | {"window": 9, "anchors": 1, "sinks": False},
    "sum_exp_channel": SMALL
    | SUM
    | {"feature_map": "exp", "gate": "channel", "weight": None, "window": 9, "anchors": 0, "sinks": False},
}
FORMS = {"gated": GATED, "window": WINDOW, "hybrid": HYBRID}

# Triton compiles anew for row counts of 1 and for multiples of 16: these lengths are neither
ODD_LENGTHS = (2, 17, 63, 65, 129, 193)
EVERY_LENGTH = (0, 1, 2, 17, 63, 64, 65, 127, 128, 129, 193)

# In the interpreter a property sees one or two cases of each op, rows over several tiles and chunks (conftest.py).
# Between them the properties see every kind of gate, offsets, anchors, sinks and every map.
INTERPRETED_SIZES = {"B": 1, "T": 21, "G": 2}
INTERPRETED_FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "test_chunked_is_the_reference": {
        "gated": ("query_unnormalised",), "window": ("anchors_shared_sinks",), "hybrid": ("sum_all_query_sinks",),
    },
    "test_segments_with_a_carried_state_are_the_whole": {
        "gated": ("channel_offset_unnormalised",), "window": ("anchors_sinks_a_head",), "hybrid": ("merge_exp_key",),
    },
    "test_packed_is_separate": {
        "gated": ("key_offset",), "window": ("anchors_sinks_a_head",), "hybrid": ("merge_outside_key", "merge_channel"),
    },
    "test_padding_is_not_there": {
        "gated": ("channel_offset_unnormalised", "key_offset"), "window": ("anchors_shared_sinks",),
        "hybrid": ("merge_channel", "sum_outside_exp_query"),
    },
    "test_the_future_changes_nothing": {
        "gated": ("channel",), "window": ("plain",), "hybrid": ("merge_all_scalar_absolute",),
    },
    "test_absorbed_gates_are_the_same_gates": {"gated": ("key_offset",), "hybrid": ("sum_identity_key",)},
    "test_memory_is_never_read_before_it_is_written": {
        "gated": ("key_offset",), "window": ("anchors_shared_sinks",), "hybrid": ("merge_outside_key",),
    },
    "test_outputs_need_no_final_state": {
        "gated": ("query_unnormalised",), "window": ("anchors_sinks_a_head",),
        "hybrid": ("sum_outside_identity_unnormalised", "merge_channel", "sum_exp_channel"),
    },
}  # fmt: skip
