"""One stage of training on transformers' Trainer: checkpoints of what trains, whole or absent; resume; interrupt."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from lizard_models.distill import parallel
from lizard_models.distill.arguments import RunArguments, total_steps, training_arguments
from lizard_models.distill.attention_log import AttentionLog
from lizard_models.distill.checkpoint_files import StateFiles, refuse_pickles, write_sums
from lizard_models.distill.compiled import compiled
from lizard_models.distill.divergence import DivergenceCallback, RollBack, halve
from lizard_models.distill.finite import FiniteWatch, first_nonfinite
from lizard_models.distill.graphed import graphed
from lizard_models.distill.log import LogCallback, LogFile
from lizard_models.distill.progress import InterruptCallback, ProgressCallback, TrainingInterrupted
from lizard_models.distill.resume import RUN as RUN  # known by this name here too
from lizard_models.distill.resume import (
    SAVING,
    checkpoint_to_resume,
    checkpoints,
    frozen_digest,
    older,
    put_in_place,
    remove,
    step_of,
)
from lizard_models.distill.schedule import cosine_schedule
from lizard_models.distill.speed import Speed, peak_of
from lizard_models.distill.stream import endless
from lizard_models.files.folders import sync_all
from lizard_models.files.records import read_json
from lizard_models.files.weights import name_some, nonfinite
from lizard_models.recipes import Recipe

INPUT_READER = re.compile(r"\.lizard\.(gate|mix)\.")
TRAINED = "trained.safetensors"
DIVERGED = 1.5  # a stage whose loss ends above its first by this factor is warned of; batches differ by less


class UpdateCallback(TrainerCallback):
    """Shows the watch the weights after each update, and starts the clock."""

    trainer: DistillTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As transformers calls it: where the run goes on."""
        self.trainer.speed.start(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As transformers calls it: the step that is not counted yet."""
        trained = self.trainer.model
        self.trainer.watch.updated(state.global_step + 1, parallel.trained(trained))


@dataclass
class StageResult:
    """What a stage did: steps in all, seconds of this run, loss by step, trained parameters, hash of the data."""

    steps: int
    seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)
    parameters: int = 0
    data: str = ""

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the log, at least one entry; NaN for a run without steps."""
        tail = [loss for _, loss in self.losses[-max(1, len(self.losses) // 10) :]]
        return sum(tail) / len(tail) if tail else float("nan")


class DistillTrainer(StateFiles):
    """A Trainer whose checkpoints hold only the parameters that train, and appear whole or not at all.

    They do not depend on how many processes wrote them, nor on whether the model was sharded.
    """

    model: nn.Module
    saving_to: str | None = None
    sharded = False
    halved = False  # whether it goes on with half the rate that the checkpoint has
    watch: FiniteWatch
    divergence: DivergenceCallback
    speed: Speed
    loss_sum: Tensor | float = 0.0
    inputs: Any = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's; the loss is kept for the watch, and what an op refuses for a NaN is said of the step."""
        self.inputs = args[1]
        try:
            loss = super().training_step(*args, **kwargs)
        except ValueError as error:
            raise self.watch.refused(self.state.global_step + 1, error) from error
        self.loss_sum = self.loss_sum + loss
        return loss

    def where(self) -> str:
        """Where the newest batch meets what is not finite: in a weight, or first after which layer."""
        return first_nonfinite(self.model, self._prepare_inputs(self.inputs))

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._watched_norm()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._watched_norm() if grad_norm is None else grad_norm

    def _watched_norm(self) -> Tensor:
        """Norm of all gradients, computed as torch's clipping does; it and the loss of this step are looked at."""
        grads = {name: p.grad for name, p in parallel.trained(self.model) if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(grads.values())))
        norm = torch.linalg.vector_norm(norms)
        loss, self.loss_sum = self.loss_sum, 0.0
        assert isinstance(loss, Tensor)  # a training step came before
        self.watch.step(self.state.global_step + 1, loss, list(grads), norms, parallel.whole(norm))
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, after a look at the steps it is about, which names parameters; with speed and memory."""
        self.watch.settle()
        if "loss" in logs:
            logs |= self.speed.read(self.state.global_step, self.args.device)
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the parameters that train; every process must call it."""
        state = trained_state(self.model)
        if self.args.should_save:
            folder = Path(output_dir or self._get_output_dir(None))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained_state(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.halved:
            halve(self.optimizer, self.lr_scheduler)

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return parallel.Prepared(model) if self.sharded else super()._wrap_model(model, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self.saving_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(None))
        main = parallel.is_main_process()
        self.watch.state(self.state.global_step, parallel.trained(self.model), self.optimizer)
        draft = parallel.agreed(tempfile.mkdtemp(prefix=SAVING, dir=run_dir) if main else None)
        try:
            self.saving_to = draft
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.saving_to = None
            parallel.wait_for_all()
            if main:
                written = next(Path(draft).glob("checkpoint-*"))
                write_sums(written)
                sync_all(written)
                put_in_place(written, run_dir)
                good = self.divergence.last_good()  # stays apart from the others, which are of a loss that ran away
                for old in checkpoints(run_dir)[: -(self.args.save_total_limit or 1)]:
                    if old != good:
                        remove(old)
        finally:
            if main:
                shutil.rmtree(draft, ignore_errors=True)
        parallel.wait_for_all()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Names and whole values of the parameters that train."""
    return {name: parallel.whole(p).contiguous() for name, p in parallel.trained(model)}


def load_trained_state(model: nn.Module, checkpoint: Path) -> None:
    """Writes a checkpoint's parameters into a model. Raises ValueError unless they are just those that train."""
    refuse_pickles(checkpoint)
    try:
        saved = load_file(checkpoint / TRAINED)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint / TRAINED} cannot be read ({error}): {older(checkpoint)}") from error
    if bad := nonfinite(saved):
        raise ValueError(
            f"{checkpoint / TRAINED} holds numbers that are not finite: {name_some(bad)}; {older(checkpoint)}"
        )
    present = dict(parallel.trained(model))
    if saved.keys() != present.keys():
        different = sorted(saved.keys() ^ present.keys())
        raise ValueError(f"{checkpoint} is of another model: {len(different)} parameters differ, first {different[0]}")
    with torch.no_grad():
        for name, value in saved.items():
            present[name].copy_(parallel.like(value, present[name]))


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    gate_learning_rate: float | None = None,
    new_learning_rate: float | None = None,
) -> list[dict]:
    """Parameters that train, by peak rate: weights that read the layer's input (gate, token bias), other new
    parameters, and the rest. A rate of None is that of the next wider kind."""
    new_rate = learning_rate if new_learning_rate is None else new_learning_rate
    reading_rate = new_rate if gate_learning_rate is None else gate_learning_rate
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            reads_input = INPUT_READER.search(name) is not None and parameter.ndim == 2
            rate = reading_rate if reads_input else new_rate if ".lizard." in name else learning_rate
            groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def run_stage(
    objective: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    run: RunArguments,
    *,
    quantity: str,
    gate_learning_rate: float | None = None,
    new_learning_rate: float | None = None,
    flop_per_token: float | None = None,
) -> StageResult:
    """Trains the parameters of ``objective`` that require gradients.

    objective: forward(input_ids [B, T]) -> {"loss": scalar}. quantity: what the loss is called on the screen.
    flop_per_token: of a step, for the log.
    With ``run.resume`` it goes on from the newest checkpoint; a finished run is only loaded.

    Raises ValueError if nothing trains, if frozen weights are not finite, if checkpoints are there and ``resume`` is
    not set, or if they are of another run or damaged; FloatingPointError if a loss, a gradient or what a checkpoint
    would hold is not finite, or if the loss runs away twice (``DivergenceCallback``); TrainingInterrupted after Ctrl-C
    and a checkpoint.

    Started by torchrun or accelerate, the batch is shared among the processes. With ``run.fsdp`` the model is sharded
    over them meanwhile; what it learned is in ``objective`` in every process afterwards.
    """
    steps = total_steps(recipe, dataset)
    folder = Path(run.output_dir)
    digest = getattr(dataset, "digest", "")
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    if parameters == 0:
        raise ValueError("the model has no parameters to train in this stage")
    if bad := nonfinite({name: p for name, p in objective.named_parameters() if not p.requires_grad}):
        raise ValueError(f"the model has weights that are not finite: {name_some(bad)}; load its teacher again")
    record = {
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "steps": steps,
        "data": digest,
        "model": run.frozen or parallel.agreed(frozen_digest(objective) if parallel.is_main_process() else None),
        "sums": True,  # every checkpoint has them
    }
    last = checkpoint_to_resume(folder, run.resume, record)

    arguments = training_arguments(recipe, run, steps)
    arguments.save_total_limit = run.keep_checkpoints
    trained = parallel.sharded(objective, run.device or "cuda") if run.fsdp else objective
    if run.context_parallel > 1:
        if not hasattr(trained, "context_group"):
            raise ValueError(f"context_parallel: {run.title or 'this stage'} reads whole rows; wanted 1")
        trained.context_group = parallel.context_group(run.context_parallel, run.device or "cuda")
    progress = ProgressCallback(run.title, quantity)
    interrupt = InterruptCallback(progress.console)
    log = LogFile(run.log, run.title)
    rates = {"gate_learning_rate": gate_learning_rate, "new_learning_rate": new_learning_rate}
    groups = parameter_groups(trained, recipe.learning_rate, **rates)
    divergence = DivergenceCallback(run.title, quantity, run.diverged, folder, log)
    divergence.rates = [group["lr"] for group in groups]
    dtype = next((p.dtype for p in objective.parameters() if not p.requires_grad), torch.float32)
    peak = run.peak_tflops or peak_of(arguments.device, dtype)
    speed = Speed(recipe.batch_size * recipe.sequence_length, flop_per_token, peak)
    seen: list[Any] = []
    if run.log_attention_every:
        first = dataset[0] if isinstance(dataset, Sized) else next(iter(dataset))
        seen.append(AttentionLog(log, run.log_attention_every, trained, first["input_ids"][None]))

    def new_trainer(halved: bool) -> DistillTrainer:
        optimizer = torch.optim.AdamW(
            [dict(group) for group in groups],
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            fused=next(objective.parameters()).is_cuda,
        )
        schedule = cosine_schedule(optimizer, steps, recipe.warmup_ratio, recipe.min_learning_rate_ratio)
        trainer = DistillTrainer(
            model=trained,
            args=arguments,
            train_dataset=endless(dataset),
            optimizers=(optimizer, schedule),
            callbacks=[progress, LogCallback(log), divergence, *(own := [UpdateCallback(), *seen]), interrupt],
        )
        for callback in own:
            callback.trainer = trainer
        trainer.speed = speed
        trainer.divergence, trainer.sharded, trainer.halved = divergence, run.fsdp, halved
        if run.context_parallel > 1:
            parallel.share_batches(trainer.accelerator, run.context_parallel)
        trainer.watch = FiniteWatch(run.title, quantity, folder, trainer.where)
        trainer.remove_callback(PrinterCallback)
        return trainer

    started = time.monotonic()
    if last is not None and last.name == f"checkpoint-{steps}":
        load_trained_state(objective, last)
        history = read_json(last / "trainer_state.json", older(last))["log_history"]
    else:
        ways = compiled(objective, run.compile), graphed(objective, run.cuda_graph)
        with interrupt, contextlib.closing(progress), ways[0], ways[1]:
            good: Path | None = None
            try:
                trainer = new_trainer(halved=False)
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
            except RollBack as back:
                good = back.to
            if good is not None:  # not where it is caught: the first trainer's averages live as long as its traceback
                if parallel.is_main_process():
                    for later in (path for path in checkpoints(folder) if step_of(path) > step_of(good)):
                        remove(later)
                trainer = new_trainer(halved=True)
                trainer.train(resume_from_checkpoint=str(good))
        history = trainer.state.log_history
        # In the last step too: the checkpoint is written, and what would come next was not asked for.
        if parallel.any_process(interrupt.asked, arguments.device):
            stopped = TrainingInterrupted(f"{run.title} stopped at step {trainer.state.global_step} of {steps}")
            stopped.number = interrupt.number
            raise stopped
        if trained is not objective:
            parallel.copy_trained(trained, objective)
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    result = StageResult(steps, time.monotonic() - started, losses, parameters, digest)
    if losses and result.final_loss > DIVERGED * abs(losses[0][1]):  # a KL of nothing may round below 0
        progress.console.print(
            f"warning: {run.title}: {quantity} rose from {losses[0][1]:.4g} to {result.final_loss:.4g}, so this stage "
            "did harm; try a smaller learning rate",
            highlight=False,
        )
    return result


@contextlib.contextmanager
def only_training(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Within: gradients for the named parameters alone. After: none for any, and the model in eval mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        model.requires_grad_(False).eval()
