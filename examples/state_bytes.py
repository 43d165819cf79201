"""Bytes that one sequence takes by its length: the teacher's cache beside the state of its Lizard.

    python examples/state_bytes.py                        # preset recommended
    python examples/state_bytes.py --preset paper --lengths 8192,1048576

For the shapes of SmolLM2-135M and Llama-3-8B, from their configurations alone: nothing is fetched or allocated.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from transformers import LlamaConfig

from lizard_models import LizardConfig
from lizard_models.model.linearize import student_config
from lizard_models.runs.memory import memory_table

SHAPES = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
    ),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}
LENGTHS = "1024,8192,32768,131072,1048576"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="recommended")
    parser.add_argument("--lengths", default=LENGTHS)
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    console = Console(width=120)
    for name, teacher in SHAPES.items():
        table = memory_table(
            student_config(teacher, LizardConfig.preset(options.preset)), lengths, (torch.bfloat16, torch.float32)
        )
        table.title = f"{name}, preset {options.preset}: {table.title}"
        console.print(table)


if __name__ == "__main__":
    main()
