"""docs/state.md: its Python runs, and its numbers are those of the state it describes."""

import re
from pathlib import Path

import torch
from tiny import student, tokens

from lizard_layers import AttentionChoices, AttentionConfig, empty_state, state_bytes
from lizard_models import LizardConfig

PAGE = (Path(__file__).parents[3] / "docs" / "state.md").read_text(encoding="utf-8")


def test_the_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)  # test_compiled_decode.py compiles it
    world = dict(torch=torch, model=student(), ids=tokens(2, 12), more=tokens(2, 3), draft=tokens(2, 5))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    with torch.no_grad():
        for block in blocks:
            if "load_state" in block:
                world |= dict(ids=tokens(1, 12), draft=tokens(1, 5), questions=[tokens(1, 3), tokens(1, 4)])
            exec(block, world)
    assert world["output"].shape == (1, 24)


def test_the_bytes_are_those_of_the_state():
    sizes = {"window": 128, "anchors": 4, "feature_dim": 128}
    choices: AttentionChoices = LizardConfig.preset("plain", attention=sizes).attention
    shape = dict(hidden_size=576, num_heads=9, num_key_heads=3, head_dim=64)
    state = empty_state(AttentionConfig.from_choices(choices, **shape), 1, torch.bfloat16, "meta")
    told = 0
    for names, size in re.findall(r"^\| (`[^|]*?`):[^\n]*\| ([\d,]+) \|$", PAGE, re.M):
        fields = [getattr(state, name) for name in re.findall(r"`(\w+)`", names)]
        found = sum(t.numel() * t.element_size() for t in fields if t is not None)
        assert found == int(size.replace(",", "")), names
        told += found
    assert told == state_bytes(state) and f"{told:,} bytes per layer" in PAGE
    assert f"{30 * told / 1e6:.1f} MB for the thirty layers" in PAGE
