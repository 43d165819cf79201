"""Measured steps beside what is counted of them, as a table."""

from beside_floor import counted, table
from host_time import SHAPES
from train_step import PEAK, PRESET
from transformers import LlamaConfig

from lizard_models import LizardConfig
from lizard_models.runs.cost import run_cost


def test_rows_stand_beside_their_counts():
    shape = SHAPES["tiny"]
    weights = 64 * 16 + 4 * (16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 16 + 2 * 16) + 16  # heads of 8, the head is tied
    rows = [
        {"stage": "teacher forward", "batch": 1, "length": 8, "kind": "plain"},
        {"stage": "stage 1", "batch": 1, "length": 64, "kind": "plain", "peak_gib": 74.5, "flops": PEAK / 10,
         "tokens_per_second": 320.0},
        {"stage": "stage 2", "batch": 1, "length": 64, "kind": "checkpoint", "peak_gib": 74.6, "flops": PEAK / 10,
         "tokens_per_second": 64.0},
        {"stage": "stage 2", "batch": 1, "length": 64, "kind": "plain", "failed": "out of memory"},
    ]  # fmt: skip
    lines = table({"arguments": {"shape": "tiny", "layers": None}, "rows": rows}).splitlines()
    assert len(lines) == 2 + 3 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert lines[2].endswith("| yes | 320 | 640 | 50% |") and lines[3].endswith("| no | 64 | 640 | 10% |")
    assert "| out of memory | " in lines[4]
    sizes = [counted("tiny", None, "stage 2", 1, 64, checkpointing) for checkpointing in (True, False)]
    assert 2 * weights < sizes[0] < sizes[1]
    layers = [
        counted("tiny", n, "stage 2", 1, 64, True) - counted("tiny", n - 1, "stage 2", 1, 64, True) for n in (3, 4)
    ]
    assert layers[0] == layers[1]  # a layer more costs what the one before it did
    assert shape["num_hidden_layers"] == 4


def test_what_is_counted_is_of_the_preset_that_is_measured():
    """Kept keys, of which the steps have none, are in no count beside them."""
    size = {"sequence_length": 64, "batch_size": 1}
    of_preset = LizardConfig.preset(PRESET).replace(stage1=size, stage2=size)
    assert not of_preset.attention.kept_keys
    cost = run_cost(LlamaConfig(**SHAPES["tiny"]), of_preset, checkpointing=False)
    for stage, expected in (("stage 1", cost.stage1), ("stage 2", cost.stage2)):
        assert counted("tiny", None, stage, 1, 64, False) == expected.bytes
