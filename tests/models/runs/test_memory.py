"""Bytes by length, as they are told from a configuration, against the tensors of real caches."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from lizard_models import LizardConfig, linearize
from lizard_models.runs.memory import cache_bytes, lizard_bytes, memory_table

ROOT = Path(__file__).parents[3]
SHAPES = {  # attention of SmolLM2-135M and of Llama-3-8B, one layer of it, around a narrow stream
    "135M": dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576),
    "8B": dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, hidden_size=64),
}


def one_layer(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, intermediate_size=64, num_hidden_layers=1, max_position_embeddings=4096, **SHAPES[shape]
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def bytes_of(state: tuple) -> int:
    """Of every tensor in a state, which may hold another: that of a score."""
    return sum(bytes_of(part) if isinstance(part, tuple) else part.nbytes for part in state if part is not None)


@pytest.mark.parametrize("preset", ["plain", "recommended", "paper", "window_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_real_caches(shape, dtype, preset):
    teacher = one_layer(shape, dtype)
    model, ids = linearize(teacher, LizardConfig.preset(preset)), torch.arange(300)[None] % 50
    cache = model(ids, use_cache=True).past_key_values
    held = sum(bytes_of(layer.state) for layer in cache.layers)
    assert held == cache.state_bytes() == lizard_bytes(model.config, 300, dtype) == lizard_bytes(model.config, 9, dtype)
    kept = DynamicCache(config=teacher.config)
    teacher(ids, past_key_values=kept)
    assert kept.layers[0].keys.nbytes + kept.layers[0].values.nbytes == cache_bytes(teacher.config, 300, dtype)


def test_the_table_has_every_length_and_dtype():
    model = linearize(one_layer("135M", torch.float32), LizardConfig.preset("plain"))
    table = memory_table(model.config, [1024, 1 << 20], [torch.bfloat16, torch.float32])
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    for text in ("1,048,576", "768.0 MiB", "1,536.0 MiB", "bfloat16 and float32"):  # 2 * 2**20 * 3 * 64 * 2 bytes
        assert text in capture.get()


def test_the_example_prints_both_shapes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["state_bytes.py", "--lengths", "1024,1048576"])
    runpy.run_path(str(ROOT / "examples" / "state_bytes.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "SmolLM2-135M" in output and "131,072.0 MiB" in output
