"""Reading and writing by the length of the text: tokens a second and memory, teacher and Lizard (the paper's Figure 4).

    python benchmarks/gpu/lengths.py --batch 16 --out benchmarks/results/decode/NAME.json
    python benchmarks/gpu/lengths.py --shape smollm2-135m --batch 1 --fresh --piece 16384 --lengths 1024 16384 --out ...
    python benchmarks/gpu/plot_lengths.py benchmarks/results/decode/NAME.json --out docs/figures/NAME.svg

The whole model, random weights, bfloat16, greedy. One row of text is read in pieces, from each length on to the next
(``--fresh``: each length from its start, ``READS`` times), and what it left, state or keys and values, is repeated for
every row of the batch: memory and work of a step are those of as many texts. Then ``generate()`` goes on from there as
everyone calls it. Ways: ``teacher`` (transformers' growing cache), ``teacher-static`` (its static cache, whose step
transformers compiles anew for each length, a minute or more: see ``--static-lengths``) and ``lizard``, whose lengths
are all read first and then go on in turns (``token_times.py``). A row:

    prefill_tokens_s  tokens a second of reading, one row: the median; with ``--fresh`` from the third reading on a text
                      of a length that has come before is read from a CUDA graph (Lizard)
    first_read_s      the first of several readings             read_peak_gib  most memory while reading
    first_s           the first call, which captures or compiles
    ms_token          of a token, the median of ``--tokens`` in each of ``--turns`` turns; tokens_s of all rows
    turns_ms          its medians by turn                       quartiles_ms   of all tokens
    call_ms           what a call takes beside its tokens       replay_ms      the captured step alone, by events
    chip              clocks, power, temperature and why clocks are low, of each turn (``nvidia-smi``)
    peak_gib          most memory while generating              counted_gib    weights, state or keys and values
    floor_ms          weights (but rows of embeddings that are not looked up) and state read once, sums written, at the
                      copy's speed of the same process

Where memory runs out the row says so, and longer texts are not tried. Rows are written as they come; the same command
again goes on where the file ends, and no row is begun after ``--seconds``. Whether time grows with the length the last
line says: slowest over fastest length, beside what turns of one length differ by, the replays alone and the clocks.
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
from token_times import WARM, Writer, flatness, in_turns
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lizard_layers import tensors_of
from lizard_models import LizardConfig, linearize
from lizard_models.files.environment import environment
from lizard_models.model.decode_graph import free_decode_graphs

WAYS = ("teacher", "teacher-static", "lizard")
READS = 7  # of a length with --fresh
TEACHERS_TURNS = 2  # at most: a tenth of a second a token, and nothing that is held against 3%
DOUBLING = [2**n for n in range(10, 21)]  # 1K to 1M
# of two runs that share a file
SAME = ("shape", "layers", "batch", "tokens", "turns", "piece", "fresh", "fill", "preset")
SHOWN = ("length", "prefill_tokens_s", "first_s", "ms_token", "replay_ms", "tokens_s", "floor_ms", "read_peak_gib",
         "peak_gib", "counted_gib", "seconds")  # fmt: skip
SHAPES.setdefault("tiny", HOST_SHAPES["tiny"])


class Memory:
    """The most memory inside, in GiB, without ``beside`` bytes; None on a CPU."""

    def __init__(self, device: str, beside: int = 0) -> None:
        self.on_gpu, self.beside, self.gib = device == "cuda", beside, None

    def __enter__(self) -> Memory:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.on_gpu:
            self.gib = (torch.cuda.max_memory_allocated() - self.beside) / 2**30


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


class Reader:
    """One row of text, read as far as asked."""

    def __init__(self, args: argparse.Namespace, model: Any, way: str) -> None:
        self.args, self.model, self.way = args, model, way
        draw = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, model.vocab_size, (1, max(args.lengths)), generator=draw).to(args.device)
        self.cache: Any = None
        self.seen = 0
        self.kept: dict[int, Any] = {}  # a student's cache after each length

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

    def writer(self, length: int, cache: Any) -> Writer:
        """What goes on from a text of this length, which the one row of ``cache`` holds."""
        room = 16 + self.args.turns * (self.args.tokens + WARM + 1)
        repeats = repeated(self.way, self.model, cache, self.args.batch, room)
        token = torch.ones(self.args.batch, 1, dtype=torch.long, device=self.args.device)
        ids = torch.cat([self.ids[:, :length].expand(self.args.batch, -1), token], 1)
        return Writer(self.model, repeats, ids)


@torch.no_grad()
def measure(args: argparse.Namespace, model: Any, reader: Reader, length: int, speed: float | None) -> dict[str, Any]:
    way, started = reader.way, time.perf_counter()
    row: dict[str, Any] = {"way": way, "length": length, "weights_gib": weight_bytes(model) / 2**30}
    beside = sum(cache.state_bytes() for cache in reader.kept.values())
    try:
        with Memory(args.device, beside) as reading:
            row |= reader.go_to(length)
        row["read_peak_gib"] = reading.gib
        held, moved = state_bytes(way, reader.cache, args.batch)
        row["counted_gib"] = (sum(p.nbytes for p in model.parameters()) + held) / 2**30
        if speed is not None:
            row["floor_ms"] = 1e3 * (weight_bytes(model) + moved) / speed
        with Memory(args.device, beside) as generating:
            writer = reader.writer(length, reader.cache)
            row["first_s"] = writer.call(8)
            if way != "lizard":
                in_turns([writer], min(args.turns, TEACHERS_TURNS), args.tokens)
                row |= writer.row()
        row["peak_gib"] = generating.gib
        if way == "lizard":
            reader.kept[length] = reader.cache.copy()
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    writer = None
    free_decode_graphs(model)
    torch.compiler.reset()
    return row | {"seconds": time.perf_counter() - started}


@torch.no_grad()
def take_turns(args: argparse.Namespace, reader: Reader, rows: list[dict[str, Any]]) -> None:
    """Times of the lengths that a student has read, into their rows: as many batches as lengths at a time."""
    own = [row for row in rows if row["way"] == reader.way and row["length"] in reader.kept]
    try:
        writers = [reader.writer(row["length"], reader.kept[row["length"]]) for row in own]
        for writer in writers:
            writer.call(8)
        in_turns(writers, args.turns, args.tokens)
    except torch.OutOfMemoryError:
        for row in own:
            row["failed"] = "out of memory"
        return
    for row, writer in zip(own, writers, strict=True):
        row |= writer.row()


def resumed(args: argparse.Namespace, arguments: dict[str, Any]) -> dict[str, Any]:
    """The report to go on with. Raises ValueError where the file is of other choices."""
    report: dict[str, Any] = {"environment": environment(), "arguments": arguments, "rows": []}
    report["command"] = shlex.join(["python", *sys.argv])
    if args.out is not None and args.out.is_file():
        kept = json.loads(args.out.read_text())
        other = [name for name in SAME if kept["arguments"][name] != arguments[name]]
        if other:
            raise ValueError(f"--out {args.out} is of another run: {', '.join(other)}")
        report["rows"] = [row for row in kept["rows"] if "ms_token" in row or "failed" in row]
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
            keep(args, report)
            if "failed" in row:
                break
        take_turns(args, reader, report["rows"])
        keep(args, report)
        del reader
    return report


def keep(args: argparse.Namespace, report: dict[str, Any]) -> None:
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['arguments']['shape']}, batch {report['arguments']['batch']}")
    print(f"{'':16}" + "".join(f"{name:>17}" for name in SHOWN))
    for row in sorted(report["rows"], key=lambda row: (WAYS.index(row["way"]), row["length"])):
        cells = "".join(f"{row[name]:17,.2f}" if row.get(name) is not None else f"{'-':>17}" for name in SHOWN)
        print(f"{row['way']:16}{cells}  {row.get('failed', '')}")
    for way in WAYS:
        told = flatness([row for row in report["rows"] if row["way"] == way])
        print(f"{way}: {told}" if told else "", end="\n" if told else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--preset", default="plain")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="*", default=DOUBLING)
    parser.add_argument("--static-lengths", type=int, nargs="*", default=[32768], help="those of teacher-static")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["teacher", "lizard"])
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a turn that count")
    parser.add_argument("--turns", type=int, default=6, help="of each length")
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
