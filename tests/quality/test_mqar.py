"""Associative recall: the task is what it says, memories have equal bytes, and small models learn it."""

import dataclasses

import pytest
import torch

from benchmarks.quality.mqar import (
    IGNORED,
    MIXERS,
    Recall,
    RecallModel,
    build_mixer,
    recall_batch,
    run_recall,
    train_recall,
)
from benchmarks.quality.records import read_record

SMALL = Recall(length=32, pairs=(2, 4), vocabulary=32, width=16, heads=2, window=4, steps=4, batch_size=8)


def test_every_key_is_asked_for_once_after_its_value():
    tokens, targets = recall_batch(SMALL, 4, 50, torch.Generator().manual_seed(0))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        told = dict(zip(row[:8:2], row[1:8:2], strict=True))
        asked = [(row[i], wanted[i]) for i in range(len(row)) if wanted[i] != IGNORED]
        assert len(told) == 4 and sorted(told.items()) == sorted(asked)
        assert all(0 < key < 16 <= value < 32 for key, value in told.items())
        assert all(target == IGNORED for target in wanted[:8])
    with pytest.raises(ValueError, match="20 pairs and their questions do not fit into 32 tokens"):
        dataclasses.replace(SMALL, pairs=(20,))


@pytest.mark.parametrize("kind", MIXERS)
def test_models_are_causal_and_their_memories_equal(kind):
    torch.manual_seed(0)
    model = RecallModel(SMALL, kind)
    tokens, _ = recall_batch(SMALL, 4, 2, torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 20:] = 5
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20], rtol=1e-4, atol=1e-5)
    allowed = build_mixer("lizard", SMALL)[1]
    if kind != "attention":
        assert 0.9 * allowed <= build_mixer(kind, SMALL)[1] <= allowed
    assert build_mixer("gla", Recall())[0].maps.key_map.weight.shape[-1] <= 128  # two signs, 256 features at most
    with pytest.raises(ValueError, match="mixer 'nonsense'"):
        build_mixer("nonsense", SMALL)


def test_every_mixer_trains_and_attention_learns():
    results = {kind: train_recall(kind, SMALL, "cpu") for kind in MIXERS}
    for result in results.values():
        assert set(result["accuracy"]) == {"2", "4"} and len(result["losses"]) == 4
    for kind in ("lizard", "gla"):
        halves = train_recall(kind, dataclasses.replace(SMALL, precision="bf16"), "cpu")["losses"][-1][1]
        assert halves == pytest.approx(results[kind]["losses"][-1][1], rel=0.05)
    with pytest.raises(ValueError, match="precision must be fp32 or bf16, got 'fp8'"):
        dataclasses.replace(SMALL, precision="fp8")
    learnt = train_recall("attention", dataclasses.replace(SMALL, steps=300, width=32, learning_rate=1e-2), "cpu")
    assert learnt["accuracy"]["2"] > 0.5


def test_rows_keep_the_best_rate_and_finished_ones_are_left_out(tmp_path):
    tiny, said, out = dataclasses.replace(SMALL, steps=2), [], tmp_path / "mqar.jsonl"
    run_recall(out, [("window", tiny)], [1e-3, 1e-2], device="cpu", minutes=0, say=said.append)
    assert len(said) == 2 and "not started" in said[0] and not list(tmp_path.iterdir())
    for _ in range(2):
        run_recall(out, [("window", tiny)], [1e-3, 1e-2], device="cpu", jobs=1, say=said.append)
    assert len(said) == 3
    saved = read_record(out, "window.s0")
    assert saved["best_rate"] in (1e-3, 1e-2) and len(saved["by_rate"]) == 2 and saved["settings"]["mixer"] == "window"
    assert saved["accuracy"] == saved["by_rate"][str(saved["best_rate"])] and saved["memory_bytes"] > 0
