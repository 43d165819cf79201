"""The least time of a step of stage 2: operations are those of model-flops use, the parts add up."""

import sys

import pytest
import step_floor
from model_flops import of_a_step
from transformers import LlamaConfig

from lizard_models import LizardConfig

CONFIG = LlamaConfig(
    vocab_size=30, hidden_size=24, intermediate_size=28, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def test_operations_are_those_that_a_step_needs(monkeypatch):
    choices = LizardConfig.preset("plain")
    rank = choices.stage2.lora_rank
    assert step_floor.adapter_numbers(CONFIG, rank) == 3 * rank * (2 * 48 + 2 * 36 + 3 * 52)
    monkeypatch.setattr("model_flops.adapters", lambda model: step_floor.adapter_numbers(CONFIG, rank))
    found = step_floor.floor(CONFIG, 40)
    for stage, parts in (("stage 2 CE", ("student",)), ("stage 2", ("student", "teacher"))):
        counted = sum(t.operations for t in found if t.part in parts)
        assert counted == of_a_step(stage, None, CONFIG, choices.attention, 1, 40)
    again = {t.what: t.operations for t in found if t.part == "again"}
    # q, k, v, o, gate and up, but not down
    assert again["run again: products"] == 2 * 40 * 3 * 24 * (2 * 24 + 2 * 12 + 2 * 28)


def test_the_least_is_the_sum_of_what_runs():
    found = step_floor.floor(CONFIG, 40, product=1e9, sdpa=5e8, copy=1e6)
    for term in found:
        speed = 5e8 if "softmax" in term.what else 1e9
        assert term.ms == pytest.approx(1e3 * (term.operations / speed + term.bytes / 1e6))
    alone, inside = (step_floor.least(found, teacher, 0) for teacher in (False, True))
    assert inside - alone == pytest.approx(sum(t.ms for t in found if t.part == "teacher"))
    half, all_of_them = (step_floor.least(found, True, share) for share in (0.5, 1))
    assert half - inside == pytest.approx(all_of_them - half) and half > inside


def test_the_table_stands_beside_what_was_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["step_floor.py", "--again", "0", "13"])
    assert step_floor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("wanted 2" in line for line in lines) == sum("wanted 1" in line for line in lines) == 4
    assert any(line.startswith("  LoRA: ") and "training/" in line for line in lines)
    monkeypatch.setattr(sys, "argv", ["step_floor.py", "--results", str(tmp_path)])
    assert step_floor.main() == 0 and "no file has the teacher's LoRA" in capsys.readouterr().out
