"""Peak memory of converting an 8B-shaped teacher, random bf16 weights, whose shards are written one at a time.

    python benchmarks/convert_8b.py --folder /tmp/convert-8b --out benchmarks/results/convert_8b.json

Needs 33 GB of disk at ``--folder``, which is deleted at the end, and the memory of one shard to write the teacher. The
conversion runs in a process of its own, so its peak holds Python, torch and transformers and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA_8B = dict(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
)
CONVERT = """
import json, pathlib, re, sys, time
from lizard_models import LizardConfig, linearize_folder

def peak():  # ru_maxrss would hold the parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

imported, start = peak(), time.monotonic()
linearize_folder(sys.argv[1], sys.argv[2], LizardConfig.preset("plain"))
seconds = time.monotonic() - start
print(json.dumps({"seconds": seconds, "peak_after_imports_bytes": imported, "peak_bytes": peak()}))
"""


def write_teacher(folder: Path, shard: str) -> None:
    """Random weights of the shape of Llama-3-8B, one shard in memory at a time."""
    config = LlamaConfig(**LLAMA_8B, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    plan = split_torch_state_dict_into_shards(
        shapes, max_shard_size=shard, filename_pattern="model{suffix}.safetensors"
    )
    folder.mkdir(parents=True)
    for name, tensors in plan.filename_to_tensors.items():
        weights = {t: torch.empty(shapes[t].shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02) for t in tensors}
        save_file(weights, folder / name, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def largest_layer() -> int:
    """Bytes of one decoder layer in bf16."""
    with torch.device("meta"):
        layer = LlamaForCausalLM(LlamaConfig(**LLAMA_8B | {"num_hidden_layers": 1})).model.layers[0]
    return sum(2 * p.numel() for p in layer.parameters())


def measure(folder: Path, shard: str) -> dict:
    """Writes the teacher, converts it in a fresh process, and returns sizes and times."""
    write_teacher(folder / "teacher", shard)
    sizes = [path.stat().st_size for path in (folder / "teacher").glob("*.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(folder / "teacher"), str(folder / "lizard")],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    new = sorted((folder / "lizard").glob("*.safetensors"))[-1].stat().st_size
    return {
        "teacher_bytes": sum(sizes),
        "shards": len(sizes),
        "largest_shard_bytes": max(sizes),
        "largest_layer_bytes": largest_layer(),
        "new_parameter_bytes": new,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; must not exist, is deleted")
    parser.add_argument("--shard", default="5GB", help="largest shard of the teacher")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"--folder {arguments.folder} exists already")
    try:
        result = measure(arguments.folder, arguments.shard)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    result["limit_bytes"] = 2 * result["largest_shard_bytes"] + result["largest_layer_bytes"]
    result["environment"] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors")},
    }
    text = json.dumps(result, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
