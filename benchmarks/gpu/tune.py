"""Tune the launch configurations of the ops for a shape on the GPU at hand, and store them.

    python benchmarks/gpu/tune.py                                   # the shape of kernel_times.py, T = 2048
    python benchmarks/gpu/tune.py --ops "layer merge" --minutes 2.5 --least-gain 0.004
    python benchmarks/gpu/tune.py --head-dim 64 --heads 9 --key-heads 3 --length 4096 --out launches.json

Prints every time, what was found, and the time of the whole call (forward and backward) before and after. A program
uses the file with ``lizard_ops.use_tuned(path)``; without --out it is ~/.cache/lizard-attn/launches.json.

Workers first compile every candidate side by side and launch none. One that spills more registers than the table's, or
does not fit the chip, is not timed. A candidate that crashes the GPU costs its process: the next one goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import layer_merge, layer_sum
from shape_times import RUNS, inputs_of
from shapes import HEAD_DIM, HEADS, KEY_HEADS, make_layer
from triton.testing import do_bench

import lizard_ops
from lizard_ops import tuning

LAYERS = {"layer merge": layer_merge, "layer sum": layer_sum}
SPILLS = 16  # registers more than the table's that a candidate may spill
PROCESSES = 4  # begun before a shape is given up


class Progress:
    """What the processes of one op tell each other: a file with one record a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self, what: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [x for x in map(json.loads, self.path.read_text().splitlines()) if x["what"] == what]


def call_of(op: str, options: argparse.Namespace) -> Callable[[], Any]:
    if op in LAYERS:
        layer = make_layer(options.length, tokens=options.tokens)
        inputs = [x for x in vars(layer).values() if x.requires_grad]

        def call() -> Any:
            o = LAYERS[op](layer)
            return o, torch.autograd.grad(o, inputs, layer.grad, allow_unused=True)

        return call
    x = inputs_of(options.length, options.heads, options.key_heads, options.head_dim, options.tokens)

    def call_op() -> Any:
        o, leaves = RUNS[op](x)
        return o, torch.autograd.grad(o, leaves, x.grad, allow_unused=True)

    return call_op


def load_only() -> dict[str, tuple[str, int]]:
    """From here on kernels are compiled and loaded, not launched; filled with name and spilled registers by hash."""
    from triton.runtime.jit import JITFunction

    loaded: dict[str, tuple[str, int]] = {}
    run = JITFunction.run

    def load(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        kernel._init_handles()  # raises where it does not fit
        loaded[kernel.hash] = (self.__name__, kernel.n_spills)
        return kernel

    JITFunction.run = load
    return loaded


def compile_part(call: Callable[[], Any], part: int, parts: int, progress: Progress) -> None:
    """Compile every ``parts``-th candidate and note how it spills beside the table's kernels."""
    loaded = load_only()
    todo = tuning.candidates(call)[part::parts]
    table = dict(loaded)
    for key, fields in todo:
        try:
            with tuning.overriding({key: fields}):
                call()
        except Exception as error:
            progress.add(
                what="compiled", key=key, fields=fields, more=None, error=f"{type(error).__name__}: {error}"[:150]
            )
            continue
        before = {name: max(n for other, n in table.values() if other == name) for name, _ in table.values()}
        new = [n - before[name] for hash, (name, n) in loaded.items() if hash not in table]
        progress.add(what="compiled", key=key, fields=fields, more=max(new, default=0), error="")
        for hash in set(loaded) - set(table):
            del loaded[hash]


def tune(op: str, options: argparse.Namespace, progress: Progress) -> None:
    """Compile, time and store; called again after a crash, leaves out what it has timed and what crashed it."""
    call = call_of(op, options)
    call()  # the table's kernels, for the workers too
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    if options.workers and not progress.records("compiled"):
        command = [*sys.argv, "--progress", str(progress.path), "--op", op]
        parts = [f"{n}/{options.workers}" for n in range(options.workers)]
        running = [subprocess.Popen([sys.executable, *command, "--part", part]) for part in parts]
        for process in running:
            process.wait()
        print(f"{op}: compiled after {time.time() - options.begun:.0f} s", flush=True)
    hopeless = {name_of(x) for x in progress.records("compiled") if x["more"] is None or x["more"] > SPILLS}
    done = {name_of(x) for x in progress.records("asked")}
    current: dict[str, Any] = {}

    def leave_out(key: str, fields: dict[str, Any]) -> bool:
        name = name_of({"key": key, "fields": fields})
        if name in hopeless or name in done:
            return True
        current.update(key=key, fields=fields, first=current.get("key") != key)
        progress.add(what="asked", key=key, fields=fields)
        return False

    def measure(run: Callable[[], Any]) -> float:
        spent = options.milliseconds
        taken = float(do_bench(run, warmup=spent // 5, rep=spent, return_mode="median"))
        fields = {} if current["first"] else current["fields"]
        current["first"] = False
        progress.add(what="timed", key=current["key"], fields=fields, ms=taken)
        return taken

    left = options.minutes * 60 - (time.time() - options.begun)
    lizard_ops.tune(
        call, options.out, measure=measure, least_gain=options.least_gain, seconds=left, leave_out=leave_out
    )
    both = []
    for path in (None, options.out or tuning.tuned_path()):
        lizard_ops.use_tuned(path, enabled=path is not None)
        both.append(do_bench(call, warmup=50, rep=300, return_mode="median"))
    progress.add(what="whole", before=both[0], after=both[1])


def short(key: str) -> str:
    """The words of a key: op and kernel, without shapes."""
    return " ".join(word for word in key.split() if word.replace("_", "").isalpha())


def name_of(record: dict[str, Any]) -> str:
    return f"{record['key']} {json.dumps(record['fields'], sort_keys=True)}"


def show(op: str, progress: Progress, options: argparse.Namespace) -> None:
    compiled, timed = progress.records("compiled"), progress.records("timed")
    left_out = [x for x in compiled if x["more"] is None or x["more"] > SPILLS]
    print(f"{op}: {len(timed)} times taken, {len(left_out)} of {len(compiled)} candidates spill or do not fit")
    for x in left_out:
        print(f"  {x['error'] or 'spills ' + str(x['more']) + ' more'}: {x['fields']}  {short(x['key'])}")
    table = None
    for x in timed:
        table = x["ms"] if not x["fields"] else table
        change = 100 * (x["ms"] / table - 1)
        print(f"  {x['ms']:8.3f} ms ({change:+5.1f}%)  {short(x['key']):24s} {x['fields'] or 'so far'}")
    for x in progress.records("whole"):
        print(f"{op}: whole call {x['before']:.3f} -> {x['after']:.3f} ms, {time.time() - options.begun:.0f} s")
    if not progress.records("whole"):
        asked = progress.records("asked")
        print(f"{op}: given up after {name_of(asked[-1]) if asked else 'the first call'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write or add to")
    parser.add_argument("--ops", default="gated key,window,hybrid", help="of " + ", ".join([*RUNS, *LAYERS]))
    parser.add_argument("--tokens", type=int, default=32768, help="batch times length")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--key-heads", type=int, default=KEY_HEADS)
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no configuration after that time")
    parser.add_argument("--least-gain", type=float, default=0.03, help="part of the call's time a choice must save")
    parser.add_argument("--milliseconds", type=int, default=100, help="time spent on each median")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: one kernel after another")
    for name in ("--begun", "--progress", "--op", "--part"):  # how the processes call each other
        parser.add_argument(name, help=argparse.SUPPRESS, type=float if name == "--begun" else str)
    options = parser.parse_args()
    if any(op in LAYERS for op in options.ops.split(",")):
        if (options.heads, options.key_heads, options.head_dim) != (HEADS, KEY_HEADS, HEAD_DIM):
            parser.error(f"--ops layer: has {HEADS} / {KEY_HEADS} heads of {HEAD_DIM}")
    if options.op is not None:
        progress = Progress(Path(options.progress))
        if options.part is None:
            tune(options.op, options, progress)
        else:
            part, parts = map(int, options.part.split("/"))
            compile_part(call_of(options.op, options), part, parts, progress)
        return
    begun = time.time()
    for op in options.ops.split(","):
        with tempfile.TemporaryDirectory() as folder:
            progress = Progress(Path(folder) / "progress")
            options.begun = time.time() if op != options.ops.split(",")[0] else begun
            command = [sys.executable, *sys.argv, "--progress", str(progress.path), "--op", op]
            for _ in range(PROCESSES):
                child = subprocess.run([*command, "--begun", str(options.begun)])
                if child.returncode == 0 or not progress.records("asked"):
                    break
            show(op, progress, options)


if __name__ == "__main__":
    main()
