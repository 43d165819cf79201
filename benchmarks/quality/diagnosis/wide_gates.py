"""Single layers with a wide window: what the linear branch adds past it, by how much slower its gate is.

    python -m benchmarks.quality.diagnosis.wide_gates --layers 8 18 23 --data novels_train.npy \
        --eval-data novels_validation/ --out benchmarks/results/quality/diagnosis/wide_gates.json

As ``retrieval_heads.py``: the layers' inputs and outputs are read off the teacher once, in texts of 4096 tokens, and
every form trains on them alone. Errors are squared errors over squared targets after the output projection, held out,
by position.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.diagnosis.retrieval_heads import Layer, build, train
from lizard_layers import HybridAttention
from lizard_models import LizardConfig
from lizard_models.files.environment import environment
from lizard_models.model.layer_configs import stretched_gate
from lizard_models.teachers.find import load_teacher
from lizard_models.text.sequences import load_documents, load_sequences

LENGTH = 4096
EDGES = (132, 1028, 2048, LENGTH)  # past both windows and their anchors


def forms(window: int) -> dict[str, dict[str, Any]]:
    """Changes of ``plain``; the decays of a stretched gate are those of ``wide_gate_stretch``."""
    plain = LizardConfig.preset("plain").attention
    stretched = {
        f"window {window}, decays divided by {stretch}": {"window": window, **stretched_gate(plain, stretch)}
        for stretch in (1, 8, 32, 128)
    }
    return {
        f"window {window} alone": {"window": window, "linear_branch": False},
        **stretched,
        "plain": {},
        "plain, decays divided by 8": stretched_gate(plain, 8),
    }


@torch.no_grad()
def errors(layer: Layer, student: HybridAttention, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Squared error over squared target between the edges."""
    buckets = list(zip(EDGES, EDGES[1:], strict=False))
    wrong, size = (torch.zeros(len(buckets)) for _ in range(2))
    for x, o in pairs:
        wanted, got = (layer.attention.o_proj(h.flatten(2)) for h in (o, layer.run(student, x)))
        for i, (start, end) in enumerate(buckets):
            wrong[i] += (got - wanted)[:, start:end].square().sum()
            size[i] += wanted[:, start:end].square().sum()
    return (wrong / size).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 18, 23])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--eval-data", nargs="+", required=True)
    parser.add_argument("--sequences", type=int, default=12, help=f"training sequences of {LENGTH} tokens")
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    teacher = load_teacher(options.teacher)
    model = teacher.model.requires_grad_(False)
    sequences = load_sequences(options.data, teacher.tokenizer, LENGTH, vocab_size=model.config.vocab_size)
    tokens = torch.stack([sequences[i]["input_ids"] for i in range(options.sequences)])
    documents = load_documents(options.eval_data, teacher.tokenizer, LENGTH, count=3).tokens
    settings = vars(options) | {name: [Path(s).name for s in getattr(options, name)] for name in ("data", "eval_data")}
    del settings["out"]
    results: dict[str, Any] = {"environment": environment(), "settings": settings, "edges": EDGES, "layers": {}}
    for index in options.layers:
        layer = Layer(model, index)
        pairs, held_out = layer.read(model, tokens), layer.read(model, documents)
        found = results["layers"][str(index)] = {}
        for name, changes in forms(options.window).items():
            begun = time.monotonic()
            torch.manual_seed(0)
            student = build(layer, **changes)
            if student.config.linear_branch:
                train(layer, student, pairs, options.steps)
            found[name] = errors(layer, student, held_out)
            shown = " ".join(f"{error:.4f}" for error in found[name])
            print(f"layer {index}, {name}: {shown} in {time.monotonic() - begun:.0f} s", flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
