"""Runs in several processes of which one is killed, or meets an error, in the middle of a step; then gone on with.

``python -m benchmarks.faults ranks`` starts them by torchrun. Each of them is this module, which kills itself where the
environment says, and is ``lizard-attn`` otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from benchmarks.faults.world import World

KILLED = "LIZARD_FAULTS_KILLED"  # rank:stage:step, of the process that is killed and of the step that it is in
ERROR = "data: a file of one process alone"  # of a process that is not killed but meets an error, rank:stage:step:error
SECONDS = 600  # after which a run hangs
CLOSE = 1e-4  # relative difference of losses (mse: a relative error is a ratio in each process by itself)
STEPS = (
    "--preset",
    "plain",
    "--stage1-steps",
    "4",
    "--stage2-steps",
    "4",
    "--save-steps",
    "1",
    "--batch-size",
    "4",
    "--seq-len",
    "64",
)


class RankTrial(NamedTuple):
    """A run with a process killed: how it is spread, who dies where, how many go on, and what came of it."""

    way: str  # ddp or fsdp
    processes: int
    killed: str
    then: int
    outcome: str
    seconds: float  # until the run had ended after the kill
    difference: float  # largest relative difference of a loss
    weights: float  # largest difference of a weight


class RankCampaign:
    """Trials beside a run in one process that nothing happened to."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.world, self.say = World(folder), say
        self.trials: list[RankTrial] = []
        self._run(folder / "whole", 1, "ddp")
        self.losses, self.weights = losses(folder / "whole"), load_file(folder / "whole" / "model.safetensors")

    def go(self, ways: tuple[str, ...] = ("ddp", "fsdp"), then: tuple[int, ...] = (1, 2, 4)) -> None:
        """A kill in either stage, of the main process or the other, and every number of processes that goes on."""
        for way in ways:
            for place, count in enumerate(then):
                rank, stage = place % 2, 1 + (place + (way == "fsdp")) % 2
                self._try(way, f"{rank}:{stage}:{3 if stage == 1 else 2}", count)
            self._try(way, "1:1:3:error", 2)

    def _try(self, way: str, killed: str, then: int) -> None:
        out = self.world.folder / f"{way}-{killed.replace(':', '-')}-{then}"
        code, seconds, said = self._run(out, 2, way, killed)
        outcome = "same"
        if code == 0:
            outcome = "it was not killed"
        elif seconds > SECONDS:
            outcome = "hangs"
        elif killed.endswith("error") and told(said) != [f"process {killed[0]}: error: --{ERROR}"]:
            outcome = f"not said once, by its process: {told(said)}"
        else:
            code, _, said = self._run(out, then, way if then > 1 else "ddp", resume=True)
            outcome = "same" if code == 0 else f"does not go on: {said[-800:]}"
        difference = weights = float("nan")
        if outcome == "same":
            found = losses(out)
            difference = max(abs(found.get(key, 0) / loss - 1) for key, loss in self.losses.items())
            if found.keys() != self.losses.keys() or difference > CLOSE:
                outcome = "different"
            made = load_file(out / "model.safetensors")
            apart = [(made[name].float() - value.float()).abs().max() for name, value in self.weights.items()]
            weights = max(apart).item()
        self.trials.append(RankTrial(way, 2, killed, then, outcome, seconds, difference, weights))
        self.say(str(self.trials[-1]))

    def _run(
        self, out: Path, processes: int, way: str, killed: str = "", resume: bool = False
    ) -> tuple[int, float, str]:
        """Exit code, seconds and words of a run."""
        command = [
            *("linearize", str(self.world.folder / "teacher"), "--data", str(self.world.folder / "texts"), *STEPS),
            *("--set", "attention.window=16", "--set", "stage1.error=mse", "--device", "cpu", "--out", str(out)),
            *(["--fsdp"] if way == "fsdp" else []),
            *(["--resume", "auto"] if resume else []),
        ]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0"]
        launcher += ["--standalone"] if processes > 1 else []
        start = [sys.executable, *(launcher if processes > 1 else []), "-m", "benchmarks.faults.ranks"]
        began = time.monotonic()
        try:
            done = subprocess.run(
                [*start, *command],
                env={**os.environ, KILLED: killed, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return -1, SECONDS + 1, "hangs"
        if not killed and done.returncode:
            self.say(done.stderr[-2000:])
        return done.returncode, time.monotonic() - began, done.stderr

    def table(self) -> str:
        """A line a trial."""
        head = ("spread", "killed: rank, stage, step", "went on in", "outcome", "ended after, s", "losses differ by")
        rows = ["| " + " | ".join((*head, "weights by")) + " |", "|---|" + "---|" * 6]
        for trial in self.trials:
            rank, stage, step, *error = trial.killed.split(":")
            what = f"{rank}, {stage}, {step}" + " (an error)" * bool(error)
            rows.append(
                f"| {trial.way}, {trial.processes} processes | {what} | {trial.then} | "
                f"{trial.outcome[:60]} | {trial.seconds:.0f} | {trial.difference:.1e} | {trial.weights:.1e} |"
            )
        return "\n".join(rows)

    def save(self, path: Path) -> None:
        """Every trial as JSON."""
        path.write_text(json.dumps([trial._asdict() for trial in self.trials], indent=1) + "\n")


def told(said: str) -> list[str]:
    """Lines about the error of one process."""
    return [line for line in said.splitlines() if ERROR in line]


def losses(model: Path) -> dict[str, float]:
    """Of every step that is logged, by stage and step; of a step that came again the last one."""
    found = {}
    for line in (model / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            found[f"{entry['stage']} {entry['step']}"] = entry["loss"]
    return found


def kill_at(place: str) -> None:
    """From here on this process kills itself in the middle of that step, if it is the one: in the backward pass, with
    shards in the forward pass; or raises an error in front of it."""
    rank, stage, step, *error = place.split(":")
    if os.environ.get("RANK", "0") != rank:
        return
    from lizard_models.distill.trainer import DistillTrainer
    from lizard_models.model.attention import LizardAttention

    plain = DistillTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(self.args.output_dir).name == f"stage{stage}" and self.state.global_step == int(step) - 1:
            if error:
                raise ValueError(ERROR)
            if self.sharded:  # in the forward pass: gradients of shards come in hooks of torch's own
                attention = next(m for m in self.model.modules() if isinstance(m, LizardAttention))
                attention.register_forward_hook(lambda *given: os.kill(os.getpid(), signal.SIGKILL))
            else:
                parameter = next(p for p in self.model.parameters() if p.requires_grad)
                parameter.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))
        return plain(self, *args, **kwargs)

    DistillTrainer.training_step = training_step  # type: ignore[method-assign]


if __name__ == "__main__":
    from lizard_models.cli.main import app
    from lizard_models.distill import RunArguments

    assert RunArguments.__init__.__kwdefaults__ is not None
    RunArguments.__init__.__kwdefaults__["logging_steps"] = 1
    if os.environ.get(KILLED):
        kill_at(os.environ[KILLED])
    sys.argv[0] = "lizard-attn"
    app()
