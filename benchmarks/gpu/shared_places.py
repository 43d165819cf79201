"""Decode steps and readings of ``recommended`` with places shared out as a budget does it, beside 608 in every head.

    python benchmarks/gpu/shared_places.py --out benchmarks/results/decode/NAME.json

The share-out is one of SmolLM2-135M's by rule: how many of its 90 key heads have which number of places (two have
4,096, and 53 at most 256), in an order of chance whose layers' largest heads are much like those that were measured.
Ways: ``equal`` (608 in every head) and ``shared``; with places ``divided`` among programs where a head has many, and
``undivided``.

    layers    microseconds of the attention's step alone, bfloat16, of all layers and of some, one after the other in a
              CUDA graph, on states that are larger than the caches where the batch allows it
    model     random weights, ``generate()`` from its own CUDA graphs: ms a token; tokens a second of reading a text of
              a length that has come before
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from generate import build
from lengths import READS, Reader
from timing import median_ms
from token_times import in_turns
from torch import Tensor

from lizard_models import LizardConfig, linearize
from lizard_models.files.environment import environment
from lizard_models.model.decode_graph import free_decode_graphs
from lizard_ops import AttentionState, recurrent_hybrid_attn
from lizard_ops.hybrid_attn.triton import decode_parts

LEVELS = {0: 7, 8: 2, 16: 1, 32: 5, 64: 14, 128: 10, 256: 14, 512: 15, 1024: 11, 1536: 1, 1664: 1, 2048: 3, 3072: 4,
          4096: 2}  # heads with so many places  # fmt: skip
EQUAL, ORDER = 608, 220
SOME = ([512, 64, 128], [608, 608, 608], [1024, 512, 1024], [2048, 256, 256], [1024, 3072, 3072], [128, 64, 4096])
HEADS, KEY_HEADS, DIM, PRE_FEATURES, WINDOW, ANCHORS = 9, 3, 64, 64, 128, 4
DEVICE = "cuda"
COPIES = {1: 4, 16: 1, 64: 1}  # of the states of all layers, by the batch
Places = int | list[int]


def share_out(layers: int, heads: int) -> list[list[int]]:
    """Places of every head of every layer."""
    places = [n for n, count in LEVELS.items() for _ in range(count)]
    random.Random(ORDER).shuffle(places)
    if layers * heads > len(places):
        raise ValueError(f"layers: got {layers} of {heads} key heads, wanted at most {len(places)} heads in all")
    return [places[n * heads : (n + 1) * heads] for n in range(layers)]


@contextmanager
def divided(part: int | None) -> Iterator[None]:
    """Steps inside have parts of so many places; None: no head's places are divided, 0: those of the table."""
    table, least = decode_parts.config_for, decode_parts.UNDIVIDED
    if part is None:
        decode_parts.UNDIVIDED = 1 << 30
    elif part:
        decode_parts.config_for = lambda *x: table(*x)._replace(rows=part, columns=min(part, table(*x).columns))
    try:
        yield
    finally:
        decode_parts.config_for, decode_parts.UNDIVIDED = table, least


def token(batch: int, length: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, length, *shape, generator=draw, device=DEVICE)

    x = {"q": normal(HEADS, DIM), "k": normal(KEY_HEADS, DIM), "v": normal(KEY_HEADS, DIM)}
    x |= {"fq": normal(HEADS, PRE_FEATURES), "fk": normal(KEY_HEADS, PRE_FEATURES)}
    x = {name: t.bfloat16() for name, t in x.items()}
    return x | {"g": F.logsigmoid(normal(KEY_HEADS) + 4), "scores": normal(KEY_HEADS)}


def options_of(places: Places) -> dict[str, Any]:
    made = {"window": WINDOW, "anchors": ANCHORS, "kept_keys": places, "score_delay": WINDOW - 1}
    return made | {"mix": "merge", "coverage": "left", "feature_map": "softmax", "output_final_state": True}


def full(batch: int, places: Places) -> AttentionState:
    """A state long past full."""
    state = recurrent_hybrid_attn(**token(batch, 0), impl="torch", **options_of(places))[1]
    for name, x in state._asdict().items():
        if x is not None and x.is_floating_point():
            x.uniform_(-1 / 64 if name == "ring_g" else 0, 0 if name == "ring_g" else 1)
    state.position.fill_(100_000)
    held = state.kept_positions
    state.kept_positions.copy_((torch.arange(held[0].numel(), device=DEVICE) * 8 + ANCHORS).view(held[0].shape))
    return state


@torch.no_grad()
def step_us(batch: int, layers: list[Places], copies: int, milliseconds: int) -> float:
    """Microseconds of a step of all these layers."""
    states = [(full(batch, places), options_of(places)) for _ in range(copies) for places in layers]
    x = token(batch)

    def steps() -> None:
        for state, options in states:
            recurrent_hybrid_attn(**x, initial_state=state, inplace=True, impl="triton", **options)

    steps()  # what is made once is made before a graph is captured
    return 1e3 * median_ms(steps, milliseconds, graph=True) / copies


def time_layers(milliseconds: int, batches: list[int], parts: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"all": [], "some": []}
    tables: dict[str, list[Places]] = {"equal": [EQUAL] * 30, "shared": list(share_out(30, KEY_HEADS))}
    for places in SOME:
        row: dict[str, Any] = {"places": places}
        for name, part in (("undivided", None), ("divided", 0)):
            with divided(part):
                row[name] = step_us(1, [places] * 24, 1, milliseconds) / 24
        found["some"].append(row)
        print(row, flush=True)
    for batch in batches:
        for name, layers in tables.items():
            row = {"way": name, "batch": batch}
            for kind, part in (("undivided", None), ("divided", 0), *((f"parts of {n}", n) for n in parts)):
                with divided(part):
                    row[kind] = step_us(batch, layers, COPIES[batch], milliseconds)
            found["all"].append(row)
            print(row, flush=True)
    return found


def model_of(args: argparse.Namespace, way: str) -> Any:
    teacher = build(args)
    config = teacher.config
    table = share_out(config.num_hidden_layers, config.num_key_value_heads) if way == "shared" else EQUAL
    model = linearize(teacher, LizardConfig.preset("recommended", attention={"kept_keys": table}))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def time_model(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for way in ("equal", "shared"):
        model = model_of(args, way)
        reader = Reader(args, model, "lizard")
        for length in args.lengths:
            row: dict[str, Any] = {"way": way, "length": length, "batch": args.batch, **reader.go_to(length)}
            for name, part in (("undivided", None), ("divided", 0)):
                with divided(part):
                    writer = reader.writer(length, reader.cache)
                    writer.call(8)
                    in_turns([writer], args.turns, args.tokens)
                    row[f"ms_token {name}"] = writer.row()["ms_token"]
                free_decode_graphs(model)
            rows.append(row)
            print(row, flush=True)
    return rows


def print_tables(report: dict[str, Any]) -> None:
    for rows in (report["some"], report["all"], report["model"]):
        for n, row in enumerate(rows):
            if n == 0:
                print("\n" + "".join(f"{name:>22}" for name in row))
            cells = (f"{x:,.2f}" if isinstance(x, float) else str(x) for x in row.values())
            print("".join(f"{cell:>22}" for cell in cells))


def save(report: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", help="of the whole model")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384], help="none: layers alone")
    parser.add_argument("--batch", type=int, default=1, help="texts that the model writes")
    parser.add_argument("--batches", type=int, nargs="*", choices=COPIES, default=list(COPIES), help="of the layers")
    parser.add_argument("--parts", type=int, nargs="*", default=[], help="other sizes of a part, powers of two")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens that are timed in a turn")
    parser.add_argument("--turns", type=int, default=3, help="how often")
    parser.add_argument("--milliseconds", type=int, default=20, help="how long each step is timed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.piece, args.fresh, args.fill = max(args.lengths, default=1), True, False  # as ``lengths.py`` names them

    report: dict[str, Any] = {"all": [], "some": [], "model": [], "reads": READS, "environment": environment()}
    if args.device == "cuda":
        report |= time_layers(args.milliseconds, args.batches, args.parts)
        save(report, args.out)
    report["model"] = time_model(args) if args.lengths else []
    save(report, args.out)
    print_tables(report)


if __name__ == "__main__":
    main()
