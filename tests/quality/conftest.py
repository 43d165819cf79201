"""A folder of results with a few rows in it."""

import dataclasses

import pytest
from measured import BASE, BUDGET, loss, write_row

from benchmarks.quality.records import merge_records
from benchmarks.quality.rows import RowSpec, controls


@pytest.fixture
def folder(tmp_path):
    row = RowSpec(name="recommended")
    beside = controls(row, BUDGET)
    write_row(tmp_path, beside["teacher"], 3.0)
    for seed in (0, 1):
        write_row(tmp_path, dataclasses.replace(beside["control"], seed=seed), 3.4)
    more = {
        "branches": {"without_linear": loss(3.5), "without_window": loss(5.0)},
        "passkey": {"256": 1.0, "1024": 0.5},
        "length": loss(3.3, (0, 128, 4096, 65536)),
        "tasks": {
            "metrics": {"piqa": {"acc": 0.6, "acc_norm": 0.61, "acc_norm_stderr": 0.01, "documents": 9, "ties": 2}}
        },
    }
    write_row(tmp_path, row, 3.1, **more)
    order = {"kl": 0.1, "saved": {"0": 0.01, "1": 0.03}, "order": [1, 0]}
    write_row(tmp_path, RowSpec(name="plain"), 3.15, restore=order)
    write_row(tmp_path, dataclasses.replace(row, seed=1), 3.12)
    for seed, value in ((0, 3.1), (1, 3.12)):
        write_row(tmp_path, dataclasses.replace(BASE, seed=seed), value)
    for role in controls(BASE, BUDGET).values():
        write_row(tmp_path, role, 3.0 if role.preset == "teacher" else 3.4)
    costlier, narrow = ("A4-query-head-keys", 3.0), ("A8-features-64", 3.3)
    for name, value in (("gate-none", 3.3), ("gate-scalar", 3.0), ("stage2-lr-1e-3", 3.0), costlier, narrow):
        write_row(tmp_path, dataclasses.replace(BASE, name=name), value)
    settings = {"mixer": "lizard", "width": 8, "length": 64, "steps": 3, "batch_size": 2, "learning_rate": [1]}
    recall = {"settings": settings, "accuracy": {"4": 0.5}, "memory_bytes": 4096}
    merge_records(tmp_path / "mqar.jsonl", {"lizard.s0": recall})
    other = {**recall, "settings": {**settings, "mixer": "gla"}, "accuracy": {"4": 0.25}}
    merge_records(tmp_path / "mqar.jsonl", {"gla.s0": other})
    return tmp_path
