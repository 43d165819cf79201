"""The example architecture trains on the op and generates from its state."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "small_gpt.py"


@pytest.fixture
def small_gpt():
    spec = importlib.util.spec_from_file_location("small_gpt", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_gpt_trains_and_generates(small_gpt, request):
    device = request.config.getoption("--device")
    torch.manual_seed(0)
    model = small_gpt.SmallGPT(width=32, heads=2, layers=2).to(device)
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 20), dtype=torch.uint8)
    rows = text[: 2 * 65].view(2, 65).long().to(device)
    with torch.no_grad():
        before = small_gpt.loss_of(model, rows).item()
    small_gpt.train(model, text, steps=30, size=4, length=64, device=device)
    with torch.no_grad():
        after = small_gpt.loss_of(model, rows).item()
    assert after < before - 1.0
    assert small_gpt.largest_step_difference(model, rows[:1, :20]) < 1e-4
    made = small_gpt.generate(model, rows[:1, :20], 8)
    assert isinstance(made, bytes) and len(made) == 8
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_script_runs(small_gpt, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40)
    options = ["--steps", "2", "--batch-size", "2", "--length", "32", "--text", str(text)]
    monkeypatch.setattr(sys, "argv", ["small_gpt.py", *options])
    small_gpt.main()
    shown = capsys.readouterr().out
    assert "held-out loss" in shown and "nats a byte" in shown and "one byte at a time" in shown
