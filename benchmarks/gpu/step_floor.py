"""What a step of stage 2 takes at the least, by operations and bytes, beside the teacher's LoRA that was measured.

    python benchmarks/gpu/step_floor.py                       # no GPU: steps from benchmarks/results/training
    python benchmarks/gpu/step_floor.py --product 800 --sdpa 650 --copy 4.5 --again 13

One row of the 8B shape in bfloat16, preset ``plain``: products, softmax attention and what lies between them at the
best speeds that were seen on an H200, every tensor that a kernel must read or write once. Lizard's own kernels count
as products, which they are far from; optimizer, embeddings, casts and launches count as nothing. So a step on that chip
takes longer. "run again" is what gradient checkpointing computes a second time: a layer but for its last product.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, NamedTuple

from decode_graph import SHAPES
from goals import LARGE, RESULTS, Report, fastest, on, reports
from model_flops import attention, head, layer_of, weights
from roofline import HALF, forward_operations, total
from transformers import LlamaConfig

from lizard_models import LizardConfig

PRODUCT = 772e12  # operations a second of gate and up at 32,768 tokens: 128 in 638 ms, training/h200_train_8b_32k.json
SDPA = 602e12  # of the teacher's softmax attention there: 64 in 935 ms
COPY = 4.24e12  # bytes a second: copy_bytes_s of decode/h200_lengths_8b_b16.json
GOALS = {2048: 1.0, 32768: 2.0}


class Term(NamedTuple):
    what: str
    part: str  # "teacher", "student", or "again" where layers are run again
    ms: float
    operations: float
    bytes: float


def adapter_numbers(config: Any, rank: int) -> int:
    """Of LoRA's matrices on all seven projections of a layer, L r sum (in + out)."""
    h, m = config.hidden_size, config.intermediate_size
    wide, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return config.num_hidden_layers * rank * (2 * (h + wide) + 2 * (h + narrow) + 3 * (h + m))


def floor(config: Any, length: int, product: float = PRODUCT, sdpa: float = SDPA, copy: float = COPY) -> list[Term]:
    """Terms of a step of stage 2 with one row of ``length`` tokens; speeds in operations and bytes a second."""
    choices, n, layers = LizardConfig.preset("plain"), length, config.num_hidden_layers
    h, m, v = config.hidden_size, config.intermediate_size, config.vocab_size
    last = layers * h * m  # down_proj
    lizard = layers * total(forward_operations(layer_of(config, choices.attention, n)))
    between = layers * n * HALF * (3 * m + 2 * 4 * h)  # SiLU with product: 2 m in, m out; two norms with their sums
    logits = n * v * HALF

    def products(what: str, part: str, operations: float) -> Term:
        return Term(what, part, 1e3 * operations / product, operations, 0)

    def moved(what: str, part: str, size: float) -> Term:
        return Term(what, part, 1e3 * size / copy, 0, size)

    softmax, adapters = n * attention(config, length), adapter_numbers(config, choices.stage2.lora_rank)
    return [
        products("teacher: products and head", "teacher", 2 * n * (weights(config) + head(config))),
        Term("teacher: softmax attention", "teacher", 1e3 * softmax / sdpa, softmax, 0),
        moved("teacher: norms, sums, SiLU", "teacher", between),
        moved("teacher: logits written, read twice", "teacher", 3 * logits),
        products("products, head, gradients of inputs", "student", 4 * n * (weights(config) + head(config))),
        products("adapters, forward and both gradients", "student", 6 * n * adapters),
        products("Lizard attention, forward and backward", "student", 3 * lizard),
        moved("norms, sums, SiLU, forward and backward", "student", between + layers * n * HALF * (5 * m + 2 * 4 * h)),
        moved("logits and their gradients", "student", 5 * logits),
        products("run again: products", "again", 2 * n * (weights(config) - last)),
        products("run again: Lizard attention", "again", lizard),
        moved("run again: norms, sums, SiLU", "again", between),
    ]  # fmt: skip


def least(found: list[Term], teacher: bool, again: float) -> float:
    """Milliseconds of a step, with the teacher inside or without; again: share of the layers that are run again."""
    share = {"teacher": float(teacher), "student": 1.0, "again": again}
    return sum(share[t.part] * t.ms for t in found)


def measured(results: Path, length: int) -> tuple[float, Report] | None:
    """(ms of the teacher's LoRA, file), of the newest that has it."""
    for report in on(reports(results), "training"):
        rows = [r for r in report.rows if r["length"] == length and r["stage"] == "teacher LoRA"]
        best = fastest(rows) if report.arguments.get("shape") == LARGE else None
        if best:
            return best[0], report
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--product", type=float, default=PRODUCT / 1e12, help="TFLOP/s of products")
    parser.add_argument("--sdpa", type=float, default=SDPA / 1e12, help="TFLOP/s of softmax attention forward")
    parser.add_argument("--copy", type=float, default=COPY / 1e12, help="TB/s of a copy")
    parser.add_argument("--again", type=int, nargs="*", default=[0, 32], help="layers that are run again")
    options = parser.parse_args()
    config = LlamaConfig(**SHAPES[LARGE])
    speeds = 1e12 * options.product, 1e12 * options.sdpa, 1e12 * options.copy
    for length, goal in GOALS.items():
        known, found = measured(options.results, length), floor(config, length, *speeds)
        print(f"{length} tokens")
        for term in found:
            print(f"  {term.what:42}{term.operations / 1e12:9.1f} TFLOP{term.bytes / 1e9:9.1f} GB{term.ms:9.1f} ms")
        for teacher, again in itertools.product((False, True), options.again):
            words = f"{'teacher inside' if teacher else 'next tokens alone'}, {again} layers run again"
            ms = least(found, teacher, again / config.num_hidden_layers)
            beside = f", LoRA over it {known[0] / ms:.2f} (wanted {goal:g})" if known else ""
            print(f"  at least, {words:44}{ms:9.1f} ms{beside}")
        print(f"  LoRA: {known[0]:.0f} ms, {known[1].path}" if known else "  no file has the teacher's LoRA")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
