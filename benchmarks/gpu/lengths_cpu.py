"""A token's time on a CPU by the length of the text before it: teacher and Lizard, in turns.

    python benchmarks/gpu/lengths_cpu.py --out benchmarks/results/decode/NAME.json

The whole SmolLM2-135M shape, random weights, float32, one text, greedy ``generate()``. Of each length both models have
a cache; round by round each writes some tokens at each length, until ``--seconds`` are over. ``ms_token`` is the least
of all tokens, since what else runs on the machine only adds (``median_ms`` stands beside it). On a shared machine
``--threads 1 --clock thread`` counts what the one thread has worked, without its waiting for a core. Rows are those of
``lengths.py``, as ``goals.py`` reads them.

Texts beyond ``--read`` tokens are not read, which would take minutes: the teacher gets random keys and values, and the
student reads ``--read`` tokens and counts its position up to the length (``filled`` in a row); a step does the same
work on them. From 132 tokens on keys have left the window, before that a step has no linear branch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from generate import build
from lengths import SHAPES, filled, read
from torch import Tensor
from transformers import DynamicCache

from lizard_models import LizardConfig, linearize
from lizard_models.files.environment import environment

WAYS = ("teacher", "lizard")
LENGTHS = (64, 1024, 4096, 16384, 100_000)


class Clock:
    """A streamer of ``generate()``: when each token came, by the wall or by what its thread has worked."""

    def __init__(self, kind: str) -> None:
        self.times: list[float] = []
        self.now = time.thread_time if kind == "thread" else time.perf_counter

    def put(self, _: Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        """Nothing is left to show."""


def cache_of(way: str, model: Any, ids: Tensor, most: int) -> Any:
    """What the model carries after the text ids [1, n], of which it reads no more than ``most`` tokens."""
    length = ids.shape[1]
    if way == "teacher":
        return read(model, DynamicCache(), ids, 1024) if length <= most else filled(model, length)
    cache = read(model, None, ids[:, :most], 1024)
    if length > most:
        for layer in cache.lizard_layers():
            layer.state.position.fill_(length)
        cache.seen.add(length - most)
    return cache


def token_times(model: Any, cache: Any, ids: Tensor, tokens: int, kind: str) -> tuple[list[float], Tensor]:
    """(seconds of each token but the first, the text with them), of one call of generate()."""
    clock: Any = Clock(kind)
    ids = model.generate(
        ids, past_key_values=cache, max_new_tokens=tokens + 1, do_sample=False, pad_token_id=0, streamer=clock
    )
    return [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)], ids


class Text:
    """A text of one length, which both models go on with."""

    def __init__(self, args: argparse.Namespace, models: dict[str, Any], length: int) -> None:
        self.args, self.models, self.length = args, models, length
        draw = torch.Generator().manual_seed(length)
        text = torch.randint(1, models["teacher"].vocab_size, (1, length), generator=draw)
        self.caches = {way: cache_of(way, models[way], text, args.read) for way in WAYS}
        self.ids = {way: torch.cat([text, torch.ones(1, 1, dtype=torch.long)], 1) for way in WAYS}
        self.times: dict[str, list[float]] = {way: [] for way in WAYS}

    def go_on(self) -> None:
        """A few tokens of either."""
        for way in WAYS:
            given = self.models[way], self.caches[way], self.ids[way]
            found, self.ids[way] = token_times(*given, self.args.tokens, self.args.clock)
            self.times[way] += found

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "way": way, "length": self.length, "filled": self.length > self.args.read, "tokens": len(times),
                "ms_token": 1e3 * min(times), "median_ms": 1e3 * statistics.median(times),
            }
            for way, times in self.times.items()
        ]  # fmt: skip


@torch.no_grad()
def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    teacher: Any = build(args)
    models = {"teacher": teacher, "lizard": linearize(build(args), LizardConfig.preset(args.preset)).eval()}
    models["lizard"].requires_grad_(False)
    texts = [Text(args, models, length) for length in args.lengths]
    report: dict[str, Any] = {
        "environment": environment(), "command": shlex.join(["python", *sys.argv]), "rounds": 0,
        "arguments": {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()},
    }  # fmt: skip
    begun = time.perf_counter()
    while report["rounds"] < args.rounds or time.perf_counter() - begun < args.seconds:
        for text in texts:
            text.go_on()
        report |= {"rounds": report["rounds"] + 1, "rows": [row for text in texts for row in text.rows()]}
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def print_table(report: dict[str, Any]) -> None:
    print(f"{'length':>8}{'teacher':>10}{'lizard':>10}{'ratio':>8}   ms a token (fastest); medians")
    rows = report["rows"]
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        times, medians = (one["ms_token"], other["ms_token"]), f"{one['median_ms']:.1f}, {other['median_ms']:.1f}"
        print(f"{one['length']:8}{times[0]:10.1f}{times[1]:10.1f}{times[1] / times[0]:8.2f}   {medians}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--preset", default="plain")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--read", type=int, default=1024, help="tokens that are read at most")
    parser.add_argument("--tokens", type=int, default=8, help="that are timed in each call")
    parser.add_argument("--rounds", type=int, default=3, help="at the least")
    parser.add_argument("--seconds", type=float, default=120, help="after which no round is begun")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock",
        choices=("wall", "thread"),
        default="wall",
        help="thread, with --threads 1: without waiting for others",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.clock == "thread" and options.threads != 1:
        raise ValueError(f"--clock thread: got --threads {options.threads}, wanted 1, whose work is all")
    print_table(run(argparse.Namespace(**vars(options), batch=1, device="cpu")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
