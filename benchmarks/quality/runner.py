"""Many rows side by side: processes on the GPUs given, finished rows left out, a budget of minutes kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.quality.bench import Bench
from benchmarks.quality.rows import TEACHER, RowSpec
from lizard_models.distill.progress import clock

STARTING, MEASURE = 15.0, 4.0  # seconds, until rows of this run have shown better
STEP, BUSY = (0.22, 0.35), (0.018, 0.032)  # of a step of each stage at least, and of the GPU alone for 4096 tokens
SCORES = 0.55  # of a step of stage 0, which reads 2 rows of 4096 tokens and labels them
CAPTURE = 20.0  # seconds for the graphs of both stages, whose steps have no such least
MEASURES_TOO = {
    "tasks": 10.0,
    "passkey": 3.0,
    "passkeys5": 3.0,
    "found": 2.0,
    "ruler": 30.0,
    "lines": 10.0,
    "restore": 3.0,
}  # as multiples of MEASURE
ROOT = Path(__file__).parents[2]  # of the repository, where a worker finds this package
GRACE = 20.0  # seconds a row has for its checkpoint when the time is up


class _Worker:
    """A process that runs one row after the other, so that imports and kernels are loaded once."""

    def __init__(self, slot: int, gpu: int | None, threads: int, log: Path) -> None:
        self.slot, self.log = slot, log
        self.row: RowSpec | None = None
        self.started = self.estimate = 0.0
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
        environment["PYTHONUNBUFFERED"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible_device(gpu)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.quality.worker"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,  # Ctrl-C reaches it through us, once
            )
        self.answers: queue.Queue[dict[str, str]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(json.loads(line))

    def give(self, row: RowSpec, bench: Bench, estimate: float) -> None:
        """Hands over a row."""
        self.row, self.started, self.estimate = row, time.monotonic(), estimate
        assert self.process.stdin is not None
        job = {"bench": json.loads(bench.to_json()), "row": dataclasses.asdict(row)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, str] | None:
        """What became of the row, None while it runs."""
        ended = self.process.poll() is not None
        try:
            return self.answers.get(timeout=0.5 if ended else 0)
        except queue.Empty:
            return {"fate": "failed", "message": f"exit code {self.process.returncode}"} if ended else None


class Runner:
    """Runs rows of a bench.

    gpus: their indices, empty for CPU processes. jobs_per_gpu: processes on each (or in all, on a CPU). minutes: a row
    is started only if its estimate fits into what is left, and rows still running at the end are stopped with a
    checkpoint.
    """

    def __init__(
        self, bench: Bench, console: Console, *, gpus: Sequence[int], jobs_per_gpu: int, minutes: float | None
    ) -> None:
        self.bench, self.console = bench, console
        devices: list[int | None] = [*gpus] or [None]
        self.slots: list[int | None] = [gpu for _ in range(jobs_per_gpu) for gpu in devices]
        self.begun = time.monotonic()
        self.deadline = None if minutes is None else self.begun + 60 * minutes
        self.num_layers = bench.num_layers()
        self.ratios: list[float] = []
        self.workers: dict[int, _Worker] = {}

    def run(self, rows: Sequence[RowSpec]) -> dict[str, str]:
        """What became of every row: finished, failed, stopped or not started."""
        fates: dict[str, str] = {}
        waiting = []
        for row in rows:
            if self.bench.missing(row, self.num_layers):
                waiting.append(row)
            else:
                self.bench.publish(row, self.num_layers)  # where an earlier run was killed before it could
                fates[row.stem] = "finished"
        self.say(f"{len(fates)} rows are finished, {len(waiting)} are to run, {len(self.slots)} at a time")
        try:
            while self._start(waiting) or self._busy():
                time.sleep(0.1)
                self._collect(fates)
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self._stop(fates)
        finally:
            self._stop(fates)
        fates |= {row.stem: "not started" for row in waiting}
        for fate in ("failed", "stopped", "not started"):
            if names := [name for name, f in fates.items() if f == fate]:
                self.say(f"{fate}: {', '.join(names)}")
        return fates

    def say(self, message: str) -> None:
        self.console.print(f"[{clock(time.monotonic() - self.begun)}] {message}", highlight=False, markup=False)

    def estimate(self, row: RowSpec) -> float:
        """Seconds the row will take, from its steps and from how long earlier rows took beside their estimates."""
        budget, missing = self.bench.budget, self.bench.missing(row, self.num_layers)
        seconds = STARTING + MEASURE * sum(MEASURES_TOO.get(m, 1.0) for m in missing)
        if not (self.bench.folder(row) / "model").is_dir():
            beside = max(1, self.slots.count(self.slots[0]))
            scale = beside * budget.batch_size * budget.sequence_length / 4096
            converts = row.preset not in (TEACHER, "window_only")
            least = (0.0, 0.0) if self.bench.cuda_graph else STEP
            seconds += CAPTURE * self.bench.cuda_graph
            if row.config(budget, self.num_layers).attention.kept_keys:
                seconds += SCORES * beside * self._labelled(row)
            seconds += max(least[0], scale * BUSY[0]) * budget.stage1_steps * (row.stage1 and converts)
            seconds += max(least[1], scale * BUSY[1]) * budget.stage2_steps * row.stage2 * (1 + row.stage3)
        return seconds * (statistics.median(self.ratios) if self.ratios else 1.0)

    def _labelled(self, row: RowSpec) -> float:
        """Steps whose keys get labels, in the time of one of stage 0, which grows with the square of its rows."""
        budget = self.bench.budget
        if not row.oracle:
            return budget.stage0_steps
        tokens, length = budget.batch_size * budget.sequence_length, budget.sequence_length * row.longer
        steps = budget.stage1_steps * row.stage1 + budget.stage2_steps * row.stage2
        return steps * tokens * length / (2 * 4096 * 4096)

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers.values() if worker.row is not None]

    def _start(self, waiting: list[RowSpec]) -> bool:
        """Gives rows that fit into the time to idle slots. Returns whether it gave any."""
        gave = False
        for slot, gpu in enumerate(self.slots):
            worker = self.workers.get(slot)
            if worker is not None and worker.row is not None:
                continue
            row = next((row for row in waiting if self._fits(row)), None)
            if row is None:
                break
            waiting.remove(row)
            if worker is None or worker.process.poll() is not None:
                log = self.bench.work / "logs" / f"{slot}.txt"
                threads = max(1, (os.cpu_count() or 1) // len(self.slots))
                worker = self.workers[slot] = _Worker(slot, gpu, threads, log)
            estimate = self.estimate(row)
            self.say(f"{row.stem}: started, about {clock(estimate)}")
            worker.give(row, self.bench, estimate)
            gave = True
        return gave

    def _fits(self, row: RowSpec) -> bool:
        return self.deadline is None or time.monotonic() + self.estimate(row) < self.deadline

    def _collect(self, fates: dict[str, str]) -> None:
        for worker in self._busy():
            answer = worker.answer()
            if answer is None or worker.row is None:
                continue
            row, worker.row = worker.row, None
            took = time.monotonic() - worker.started
            fates[row.stem] = answer["fate"]
            if answer["fate"] == "finished":
                self.bench.publish(row, self.num_layers)
                base = statistics.median(self.ratios) if self.ratios else 1.0
                if row.stage1 or row.stage2:  # how long it takes to train is what is hard to know
                    self.ratios.append(took / (worker.estimate / base))
                self.say(f"{row.stem}: finished in {clock(took)}{self._headline(row)}")
            else:
                self.say(f"{row.stem}: failed after {clock(took)}: {answer['message']} (log: {worker.log})")

    def _headline(self, row: RowSpec) -> str:
        record: dict[str, Any] = self.bench.record(row, self.num_layers) or {}
        loss = record.get("measures", {}).get("loss")
        return "" if loss is None else f", loss by position {' '.join(f'{mean:.3f}' for mean in loss['means'])}"

    def _stop(self, fates: dict[str, str]) -> None:
        """Ends every process: an idle one at once, a busy one after its step and a checkpoint."""
        for worker in self.workers.values():
            if worker.row is not None and worker.process.poll() is None:
                self.say(f"{worker.row.stem}: stopping with a checkpoint")
                worker.process.send_signal(signal.SIGTERM)
            elif worker.process.stdin is not None:
                with contextlib.suppress(OSError):
                    worker.process.stdin.close()
        until = time.monotonic() + GRACE
        for worker in self.workers.values():
            try:
                worker.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            if worker.row is not None:
                fates[worker.row.stem] = "stopped"
        self.workers.clear()


def visible_device(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES must say for the index-th of the devices that are visible now."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[index] if index < len(visible) else str(index)
