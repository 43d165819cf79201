"""Reading and writing by the length of the text: tokens a second and memory, teacher and Lizard (the paper's Figure 4).

    python benchmarks/gpu/lengths.py --batch 16 --out benchmarks/results/decode/NAME.json
    python benchmarks/gpu/lengths.py --shape smollm2-135m --batch 1 --fresh --piece 16384 --lengths 1024 16384 --out ...
    python benchmarks/gpu/plot_lengths.py benchmarks/results/decode/NAME.json --out docs/figures/NAME.svg

The whole model, random weights, bfloat16, greedy. One row of text is read in pieces, from each length on to the next
(``--fresh``: each length from its start, ``READS`` times), and what it left, state or keys and values, is repeated for
every row of the batch: memory and work of a step are those of as many texts. Then ``generate()`` goes on from there as
everyone calls it. Ways: ``teacher`` (transformers' growing cache), ``teacher-static`` (its static cache, whose step
transformers compiles anew for each length, a minute or more: see ``--static-lengths``) and ``lizard``. A row:

    prefill_tokens_s  tokens a second of reading, one row: the median; with ``--fresh`` from the third reading on a text
                      of a length that has come before is read from a CUDA graph (Lizard)
    first_read_s      the first of several readings             read_peak_gib  most memory while reading
    first_s           the first call, which captures or compiles
    ms_token          of a step, from calls with 1 and with N + 1 new tokens, medians of three; tokens_s of all rows
    peak_gib          most memory while generating              counted_gib    weights, state or keys and values
    floor_ms          weights (but rows of embeddings that are not looked up) and state read once, sums written, at the
                      copy's speed of the same process

Where memory runs out the row says so, and longer texts are not tried. Rows are written as they come; the same command
again goes on where the file ends, and no row is begun after ``--seconds``.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from decode_graph import SHAPES
from generate import build, clock, copy_speed
from host_time import SHAPES as HOST_SHAPES
from kept_decode import READ, UPDATED
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lizard_layers import tensors_of
from lizard_models import LizardConfig, linearize
from lizard_models.files.environment import environment
from lizard_models.model.decode_graph import free_decode_graphs

WAYS = ("teacher", "teacher-static", "lizard")
READS = 7  # of a length with --fresh
DOUBLING = [2**n for n in range(10, 21)]  # 1K to 1M
SAME = ("shape", "layers", "batch", "tokens", "piece", "fresh", "fill", "preset")  # of two runs that share a file
SHOWN = ("length", "prefill_tokens_s", "first_s", "ms_token", "tokens_s", "floor_ms", "read_peak_gib", "peak_gib",
         "counted_gib", "seconds")  # fmt: skip
SHAPES.setdefault("tiny", HOST_SHAPES["tiny"])


class Memory:
    """The most memory inside, in GiB; None on a CPU."""

    def __init__(self, device: str) -> None:
        self.on_gpu, self.gib = device == "cuda", None

    def __enter__(self) -> Memory:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.on_gpu:
            self.gib = torch.cuda.max_memory_allocated() / 2**30


def keys_and_values(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def filled(model: Any, length: int) -> DynamicCache:
    """A row of random keys and values, for a teacher whose reading would take too long; its steps are as long."""
    config, cache = model.config, DynamicCache()
    for i in range(config.num_hidden_layers):
        shape = (1, config.num_key_value_heads, length, config.head_dim)
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), i)
    return cache


def read(model: Any, cache: Any, ids: Tensor, piece: int) -> Any:
    """Reads ids [1, n] on from what the cache holds; None is a new one."""
    for part in ids.split(piece, 1):
        cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def repeated(way: str, model: Any, row: Any, rows: int, room: int) -> Any:
    """The cache of as many rows, each with what the one row holds; the row stays as it is."""
    if way == "lizard":
        cache = row.copy()
        cache.batch_repeat_interleave(rows)
        return cache
    held = keys_and_values(row)
    if way == "teacher":
        cache = DynamicCache()
        for i, pair in enumerate(held):
            cache.update(*(x.repeat_interleave(rows, 0) for x in pair), i)
        return cache
    length = held[0][0].shape[2]
    cache = StaticCache(config=model.config, max_cache_len=length + room)
    for layer, pair in zip(cache.layers, held, strict=True):
        layer.lazy_initialization(*(x.expand(rows, -1, -1, -1) for x in pair))
        for whole, x in zip((layer.keys, layer.values), pair, strict=True):
            whole[:, :, :length] = x
        layer.cumulative_length.fill_(length)
    return cache


def weight_bytes(model: Any) -> int:
    """Of the weights that a step reads: rows of the embedding are looked up, unless it is the head too."""
    table = model.get_input_embeddings().weight
    tied = table is model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else table.nbytes)


def state_bytes(way: str, row: Any, rows: int) -> tuple[int, int]:
    """Of so many rows: bytes held, and bytes that a step moves."""
    if way != "lizard":
        size = rows * sum(x.nbytes for pair in keys_and_values(row) for x in pair)
        return size, size
    fields = [pair for layer in row.lizard_layers() for pair in tensors_of(layer.state).items()]
    moved = sum(x.nbytes * ((name in READ) + 2 * (name in UPDATED)) for name, x in fields)
    return rows * row.state_bytes(), rows * moved


def write(args: argparse.Namespace, model: Any, cache: Any, ids: Tensor) -> dict[str, float]:
    """Times of generate() that goes on from a cache, which holds ids but their last column."""

    def call(tokens: int) -> float:
        nonlocal ids
        start = clock(args)
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return clock(args) - start

    first = call(8)
    pairs = [(call(1), call(args.tokens + 1)) for _ in range(3)]
    one, all_of_them = (statistics.median(times) for times in zip(*pairs, strict=True))
    token = (all_of_them - one) / args.tokens
    return {"first_s": first, "ms_token": 1e3 * token, "tokens_s": args.batch / token, "calls_s": sum(pairs, ())}


class Reader:
    """One row of text, read as far as asked."""

    def __init__(self, args: argparse.Namespace, model: Any, way: str) -> None:
        self.args, self.model, self.way = args, model, way
        draw = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, model.vocab_size, (1, max(args.lengths)), generator=draw).to(args.device)
        self.cache: Any = None
        self.seen = 0

    def go_to(self, length: int) -> dict[str, float | None]:
        """Tokens a second of what was read and seconds of the first reading, None where nothing was."""
        if self.args.fill and self.way != "lizard":
            self.cache = filled(self.model, length)
            return {"prefill_tokens_s": None}
        times, begin = [], 0 if self.args.fresh else self.seen
        for _ in range(READS if self.args.fresh else 1):
            if self.args.fresh:
                self.cache = None
            start = clock(self.args)
            self.cache = read(self.model, self.cache, self.ids[:, begin:length], self.args.piece)
            times.append(clock(self.args) - start)
        self.seen = length
        return {"prefill_tokens_s": (length - begin) / statistics.median(times), "first_read_s": times[0]}


@torch.no_grad()
def measure(args: argparse.Namespace, model: Any, reader: Reader, length: int, speed: float | None) -> dict[str, Any]:
    way, started = reader.way, time.perf_counter()
    row: dict[str, Any] = {"way": way, "length": length, "weights_gib": weight_bytes(model) / 2**30}
    try:
        with Memory(args.device) as reading:
            row |= reader.go_to(length)
        row["read_peak_gib"] = reading.gib
        held, moved = state_bytes(way, reader.cache, args.batch)
        row["counted_gib"] = (sum(p.nbytes for p in model.parameters()) + held) / 2**30
        if speed is not None:
            row["floor_ms"] = 1e3 * (weight_bytes(model) + moved) / speed
        with Memory(args.device) as generating:
            cache = repeated(way, model, reader.cache, args.batch, 4 * args.tokens + 32)
            token = torch.ones(args.batch, 1, dtype=torch.long, device=args.device)
            ids = torch.cat([reader.ids[:, :length].expand(args.batch, -1), token], 1)
            row |= write(args, model, cache, ids)
        row["peak_gib"] = generating.gib
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    cache = ids = None
    free_decode_graphs(model)
    torch.compiler.reset()
    return row | {"seconds": time.perf_counter() - started}


def resumed(args: argparse.Namespace, arguments: dict[str, Any]) -> dict[str, Any]:
    """The report to go on with. Raises ValueError where the file is of other choices."""
    report: dict[str, Any] = {"environment": environment(), "arguments": arguments, "rows": []}
    report["command"] = shlex.join(["python", *sys.argv])
    if args.out is not None and args.out.is_file():
        kept = json.loads(args.out.read_text())
        other = [name for name in SAME if kept["arguments"][name] != arguments[name]]
        if other:
            raise ValueError(f"--out {args.out} is of another run: {', '.join(other)}")
        report["rows"] = kept["rows"]
        report["commands_before"] = [*kept.get("commands_before", []), kept["command"]]
    return report


def run(args: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    report = resumed(args, {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})
    speed = copy_speed(args.device) if args.device == "cuda" else None
    report["copy_bytes_s"] = speed
    if args.device == "cuda":
        report["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    model: Any = build(args)
    for way in (way for way in WAYS if way in args.ways):
        if way == "lizard":
            model = linearize(model, LizardConfig.preset(args.preset)).eval().requires_grad_(False)
        done = {row["length"]: row for row in report["rows"] if row["way"] == way}
        reader = Reader(args, model, way)
        for length in sorted(args.static_lengths if way == "teacher-static" else args.lengths):
            if "failed" in done.get(length, {}) or time.perf_counter() - begun > args.seconds:
                break
            if length in done:
                continue
            row = measure(args, model, reader, length, speed)
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(report, indent=1) + "\n")
            if "failed" in row:
                break
        del reader
    return report


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['arguments']['shape']}, batch {report['arguments']['batch']}")
    print(f"{'':16}" + "".join(f"{name:>17}" for name in SHOWN))
    for row in sorted(report["rows"], key=lambda row: (WAYS.index(row["way"]), row["length"])):
        cells = "".join(f"{row[name]:17,.2f}" if row.get(name) is not None else f"{'-':>17}" for name in SHOWN)
        print(f"{row['way']:16}{cells}  {row.get('failed', '')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--preset", default="plain")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="*", default=DOUBLING)
    parser.add_argument("--static-lengths", type=int, nargs="*", default=[32768], help="those of teacher-static")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["teacher", "lizard"])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens that are timed")
    parser.add_argument("--piece", type=int, default=8192, help="tokens that are read at once")
    parser.add_argument("--fresh", action="store_true", help=f"read each length from its start, {READS} times")
    parser.add_argument(
        "--fill", action="store_true", help="random keys and values in place of a text the teacher read"
    )
    parser.add_argument("--seconds", type=float, default=480, help="after which no row is begun")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    report = run(parser.parse_args())
    print_table(report)
    return int(any(row.get("failed", "out of memory") != "out of memory" for row in report["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
