"""The whole way from a teacher to a saved Lizard model: measure, stages 0 and 1, measure, stage 2, measure, save."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lizard_models.distill import (
    FineTuning,
    RunArguments,
    StageResult,
    train_stage0,
    train_stage1,
    train_stage2,
    train_stage3,
)
from lizard_models.distill.arguments import check_context, check_parts, total_steps, training_arguments
from lizard_models.distill.parallel import agreed, is_main_process, join, process_count, wait_for_all
from lizard_models.distill.stage2 import check_stage2
from lizard_models.evaluation import Report, Row, attention_errors, loss_by_position, passkey_accuracy
from lizard_models.evaluation.control import window_control
from lizard_models.evaluation.neediest_layers import check_widen, neediest_layers
from lizard_models.evaluation.plot import save_report
from lizard_models.evaluation.report import CONTROL, TEACHER
from lizard_models.files.folders import KeptDraft, appear_whole, write_sums
from lizard_models.files.records import write_record
from lizard_models.files.weights import content_digest
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.layer_configs import converted_layers, lizard_config
from lizard_models.model.linearize import linearize
from lizard_models.model.widen import widen
from lizard_models.recipes import Recipe, Stage2Config
from lizard_models.runs.cost import check_run
from lizard_models.runs.cost import disk_needed as disk_needed  # known by this name here too
from lizard_models.runs.finished import refuse_broken
from lizard_models.runs.model_card import write_model_card
from lizard_models.runs.plan import Outcome, Plan, asked_stages, check_folders, precision
from lizard_models.runs.run_data import RunData
from lizard_models.runs.run_report import report_stop, write_run_report
from lizard_models.runs.score_rows import ScoreRows
from lizard_models.runs.start import begin_from
from lizard_models.runs.state_budget import evenly_kept, share_out, shared_mib, told
from lizard_models.runs.work import KEPT, LOG, ROWS, WIDE, Work
from lizard_models.teachers.find import load_teacher, save_tokenizer, teacher_digest
from lizard_models.teachers.loading import TRAINING

UNTRAINED, STAGE1, STAGE2, STAGE3 = "untrained student", "after stage 1", "after stage 2", "after stage 3"
WIDE_CONTROL, WIDENED = "control, widened", "widened"
OF_EVERY_STAGE = (
    "micro_batch_size", "save_steps", "gradient_checkpointing", "fsdp", "cuda_graph", "compile", "report_to",
    "diverged", "log_attention_every", "peak_tflops",
)  # fmt: skip
CHOSEN_ON = 4  # sequences of the training text on which layers are chosen


def run(plan: Plan, console: Console) -> Outcome:
    """Carries a plan out.

    ``plan.out`` appears when the model is finished, whole; until then everything is in ``work_folder(plan.out)``, from
    where a stopped run goes on with ``plan.resume``. The teacher is changed by stage 2.

    Several processes train together, each on its part of the batch; all measure, the main one writes and speaks.

    Raises ValueError for a bad plan, before any training; what the stages' functions raise.
    """

    def say(message: str) -> None:
        console.print(message, highlight=False, markup=False)

    console.quiet = console.quiet or not is_main_process()
    work = Work(plan, say)
    check_folders(plan, work.folder)
    try:
        return _Run(plan, console, work).outcome()
    finally:
        work.release()


class _Run:
    def __init__(self, plan: Plan, console: Console, work: Work) -> None:
        self.plan, self.console, self.say = plan, console, work.say
        self.held, self.work = work, work.folder
        self.config = plan.config
        self.device = join(plan.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if plan.fsdp and process_count() == 1:
            raise ValueError("fsdp: one process has nobody to share with; start it with torchrun --nproc-per-node")
        check_context(plan.context_parallel, plan.cuda_graph)
        self.held.hold()  # before anything is loaded, if there is something to go on with
        self.home = "cpu" if plan.fsdp else self.device  # where the weights are while nothing is measured
        self.dtype = plan.dtype or precision(plan.config.stage1, self.device)
        if "tensorboard" in plan.report_to:  # else its files would lie in the work folder, and go with it
            folder = os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{plan.out}.tensorboard")
            self.say(f"tensorboard: {folder}")
        self.say(f"teacher: {plan.teacher}")
        self.teacher = load_teacher(plan.teacher, dtype=self.dtype, device=self.home, cache=plan.cache, say=self.say)
        self.digest = agreed(teacher_digest(self.teacher) if is_main_process() else None)
        if plan.state_mib is not None:
            self.config = evenly_kept(self.teacher.model.config, plan.config, plan.state_mib)
            self.plan = plan = dataclasses.replace(plan, config=self.config)
        self.data = RunData(plan, self.teacher, self.say)
        self.documents = self.data.documents
        torch.manual_seed(plan.config.stage1.seed)  # some new parameters start at random
        self.model = linearize(self.teacher.model, plan.config).requires_grad_(False)
        self.results: dict[str, StageResult] = {}
        self.start = ""  # digest of what it begins with
        if plan.start is not None:
            self.results, self.start = begin_from(plan.start, self.model, self.digest)
            self.config = lizard_config(self.model.config)  # with the places that are shared out there
            self.say(f"{' and '.join(self.results)}: as trained in {plan.start}")
        added = sum(p.numel() for _, p in self.model.lizard_parameters())
        total = sum(p.numel() for p in self.model.parameters())
        self.say(f"student: preset {plan.config.name}, {added / 1e6:.2f}M of {total / 1e6:.1f}M parameters are new")
        # Read now, so that bad data stop the run before it starts.
        self.recipes = self._stages()
        self.sequences = {stage: self.data.rows(stage, recipe, self.model) for stage, recipe in self.recipes.items()}
        self.mib = shared_mib(self.model.config, plan.state_mib, "stage0" in self.sequences)
        for stage, rows in self.sequences.items():
            if stage != "stage0":
                self._check_stage(stage, rows)
        if plan.widen:
            self._check_widen()
        check_run(plan, self.model, list(self.sequences), self.device, self.say)
        self.held.begin(self._settings() | {"passkey_lengths": plan.passkey_lengths})
        self.rows = [Row.from_dict(values) for values in self.held.read(ROWS) or []]
        wait_for_all()

    def outcome(self) -> Outcome:
        """Measures, trains, saves; writes the report wherever it stops."""
        try:
            return self._outcome()
        except BaseException as error:
            report_stop(self.work, error, self.say)
            raise

    def _outcome(self) -> Outcome:
        plan, model = self.plan, self.model
        self._measure_starts(model)
        if "stage0" in self.sequences:
            self._fit_scores(model, self.sequences["stage0"])
        if self.mib is not None:
            self._share_places(model, self.mib)
        if "stage1" in self.sequences:
            run = self._run_arguments("stage1", "stage 1, attention approximation")
            self.results["stage1"] = train_stage1(model, self.sequences["stage1"], run)
            self._measure(STAGE1, model, errors=True)
        if plan.widen:
            self._widen(model)
        if "stage2" in self.sequences:
            run = self._run_arguments("stage2", "stage 2, fine-tuning")
            longer = self._train_longer if "stage3" in self.sequences else None
            model, self.results["stage2"] = train_stage2(model, self.sequences["stage2"], run, None, longer)
            self._measure(STAGE3 if longer else STAGE2, model)
        refuse_broken(model, self.device, self.home)
        report = Report(f"{self.config.name}: {Path(plan.teacher).name}", self.rows, self._settings())
        self._save(model, report)
        return Outcome(model, self.teacher, plan.out, report, self.results)

    def _train_longer(self, tuning: FineTuning, result: StageResult) -> None:
        """Stage 3, between stage 2 and the merge of what it trained."""
        self.results["stage2"] = result
        self._measure(STAGE2, tuning.model)
        run, config = self._run_arguments("stage3", "stage 3, longer rows"), self.plan.config
        beside = {"frozen": self._frozen("stage3")}
        run.frozen = agreed(content_digest(tuning.learned(), beside) if is_main_process() else None)
        self.results["stage3"] = train_stage3(tuning, self.sequences["stage3"], run, config.stage3.after(config.stage2))

    def _stages(self) -> dict[str, Recipe]:
        config = self.plan.config
        longer: dict[str, Recipe] = {"stage3": config.stage3.after(config.stage2)} if self.plan.stage3 else {}
        if self.plan.start is not None:
            return {"stage2": config.stage2, **longer}
        stages: dict[str, Recipe] = {}
        if self.plan.stage0 and self.model.key_scores():
            stages["stage0"] = config.stage0
        elif self.model.key_scores():
            self.say("stage 0 is left out: the keys least like the mean key are kept")
        if self.plan.stage1 and any(True for _ in self.model.stage_parameters()):
            stages["stage1"] = config.stage1
        elif self.plan.stage1:
            self.say(f"stage 1 is left out: preset {config.name} has no new parameters to train")
        if self.plan.stage2:
            stages["stage2"] = config.stage2
        return stages | longer

    def _check_stage(self, stage: str, rows: Any) -> None:
        """What a stage cannot do is said before the first one begins."""
        run, recipe = self._run_arguments(stage, stage), self.recipes[stage]
        try:
            training_arguments(recipe, run, total_steps(recipe, rows))
            if isinstance(recipe, Stage2Config):
                check_stage2(self.model, run, recipe)
            else:
                check_parts(self.model, recipe, run.context_parallel, softmax=True)
        except ValueError as error:
            raise ValueError(f"stage3: {error}" if stage == "stage3" else str(error)) from error
        if stage == "stage3" and recipe.sequence_length <= self.config.stage2.sequence_length:
            self.say(
                f"note: rows of stage 3 have {recipe.sequence_length} tokens, no more than those of stage 2, "
                f"{self.config.stage2.sequence_length}; longer ones (stage3.sequence_length) are what it is for"
            )

    def _check_widen(self) -> None:
        if self.plan.start is not None:
            self.choice = self.data.rows("the choice of layers", self.config.stage1, self.model)
        elif "stage1" not in self.sequences:
            raise ValueError("widen: layers are chosen after stage 1, which is left out; name them (wide_layers)")
        else:
            self.choice = self.sequences["stage1"]
        check_widen(self.model.config, self.plan.widen, self.config.stage1.sequence_length - 1)
        trial = self.config.replace(wide_layers=converted_layers(self.model.config)[: self.plan.widen])
        window_control(self.teacher, trial)  # a window that does not fit shows here
        wide, length = self.config.wide_window, self.config.stage2.sequence_length
        if "stage2" in self.sequences and length <= wide:
            self.say(
                f"note: sequences of {length} tokens never leave a window of {wide}, so stage 2 does not see the "
                "linear branch of the wide layers at work; longer ones (seq_len) are better"
            )

    def _widen(self, model: LizardCausalLM) -> None:
        """Gives the layers that need it their wide window; a run that goes on takes those it chose before."""
        layers = self.held.read(WIDE)
        if layers is None:
            tokens = torch.stack([row["input_ids"] for row in islice(self.choice, CHOSEN_ON)])
            both: list[torch.nn.Module] = [model, self.teacher.model]
            for one in both:
                one.to(self.device)
            with self.console.status("choosing layers") as status:
                layers = neediest_layers(
                    model,
                    self.teacher.model,
                    tokens,
                    self.plan.widen,
                    advance=lambda done, total: status.update(f"choosing layers: {done} of {total} forwards done"),
                )
            for one in both:
                one.to(self.home)
            if is_main_process():
                write_record(self.work / WIDE, layers)
        wait_for_all()
        layers = self.held.read(WIDE)
        widen(model, layers)
        self.config = self.config.replace(wide_layers=layers)
        self.say(f"window of {self.config.wide_window} where it is needed most: layers {layers}")
        if self.documents is not None or self.plan.passkey_lengths:
            self._measure(WIDE_CONTROL, window_control(self.teacher, self.config))
            self._measure(WIDENED, model)

    def _share_places(self, model: LizardCausalLM, mib: float) -> None:
        """Gives key heads the places that the budget holds; a run that goes on takes those it chose before."""
        rows, path = self.sequences["stage0"].asked, self.work / KEPT
        with self.console.status("sharing out kept keys"):
            share_out(model, rows, mib, path, self.device, self.home)
        self.config = lizard_config(model.config)
        for line in told(model.config, mib):
            self.say(line)

    def _fit_scores(self, model: LizardCausalLM, rows: ScoreRows) -> None:
        run = self._run_arguments("stage0", "stage 0, scores of keys")
        run.micro_batch_size = rows.micro_batch_size(self.plan.micro_batch_size)
        result = train_stage0(model, model.key_scores(), rows.training, run, rows.recipe, rows.held_out)
        self.results["stage0"] = result
        layers = " ".join(f"{sum(heads) / len(heads):.2f}" for heads in result.r2)
        self.say(f"scores: R2 {result.mean_r2:.3f} on {len(rows.held_out)} held-out rows, by layer {layers}")

    def _measure_starts(self, model: LizardCausalLM) -> None:
        if self.documents is None and not self.plan.passkey_lengths:
            return
        self._measure(TEACHER, self.teacher.model)
        control = window_control(self.teacher, self.plan.config)
        self._measure(CONTROL, control)
        self._measure(STAGE1 if self.start else UNTRAINED, model, errors=True)

    def _measure(self, name: str, model: torch.nn.Module, errors: bool = False) -> None:
        if any(row.name == name for row in self.rows):
            return
        row = Row(name)
        model.to(self.device)
        with self.console.status(f"measuring {name}") as status:
            done = count(1)

            def advance(_: int) -> None:
                status.update(f"measuring {name}: {next(done)} documents and prompts done")

            if self.documents is not None:
                row.loss = loss_by_position(model, self.documents.tokens, advance=advance)
                if errors and isinstance(model, LizardCausalLM):
                    tokens = self.documents.tokens[:, : self.plan.config.stage1.sequence_length]
                    row.attention_errors = attention_errors(model, tokens).readings()
                    row.relative_error = row.attention_errors["head mean"]
            if self.plan.passkey_lengths and self.teacher.tokenizer is not None:
                lengths, trials = self.plan.passkey_lengths, self.plan.passkey_trials
                row.passkey = passkey_accuracy(model, self.teacher.tokenizer, lengths, trials=trials, advance=advance)
        model.to(self.home)
        if row.loss is None and not row.passkey:
            return
        self.rows.append(row)
        if is_main_process():
            write_record(self.work / ROWS, [row.to_dict() for row in self.rows])
        parts = [] if row.loss is None else [f"loss by position {' '.join(f'{m:.3f}' for m in row.loss.means)}"]
        parts += [] if row.relative_error is None else [f"relative error {row.relative_error:.4f}"]
        parts += [f"passkey {length}: {share:.0%}" for length, share in row.passkey.items()]
        self.say(f"{name}: {', '.join(parts)}")

    def _run_arguments(self, stage: str, title: str) -> RunArguments:
        return RunArguments(
            output_dir=self.work / stage,
            resume=bool(self.plan.resume),
            device=torch.device(self.device).type,
            context_parallel=1 if stage == "stage0" else self.plan.context_parallel,
            log=self.work / LOG,
            title=title,
            frozen=self._frozen(stage),
            **{name: getattr(self.plan, name) for name in OF_EVERY_STAGE},
        )

    def _frozen(self, stage: str) -> str:
        """Digest of what a stage trains against: the teacher, and after stage 0 the scores that choose keys."""
        scores = dict(self.model.key_scores().named_parameters())
        if stage == "stage0" or not (scores or self.start):
            return self.digest
        beside = {"teacher": self.digest} | ({"start": self.start} if self.start else {})
        return agreed(content_digest(scores, beside) if is_main_process() else None)

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "teacher": plan.teacher,
            "teacher_sha256": self.digest,
            "config": self.config.to_dict(),
            "widen": plan.widen,
            "state_mib": plan.state_mib,
            "kept_keys": plan.config.to_dict()["attention"]["kept_keys"],  # before they are shared out
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": torch.device(self.device).type,
            "processes": process_count(),
            "data": plan.data,
            "weights": plan.weights,
            "eval_data": plan.eval_data,
            "eval_length": plan.eval_length,
            "eval_hash": self.documents.digest if self.documents else None,
            "passkey_trials": plan.passkey_trials,
            "asked": asked_stages(plan),
            **({"start": str(plan.start), "start_sha256": self.start} if self.start else {}),
            "stages": {name: dataclasses.asdict(result) for name, result in self.results.items()},
        }

    def _save(self, model: LizardCausalLM, report: Report) -> None:
        if not is_main_process():
            return wait_for_all()
        try:
            with appear_whole(self.plan.out, shared=False) as draft:
                model.save_pretrained(draft)
                if self.teacher.tokenizer is not None:
                    save_tokenizer(self.teacher.tokenizer, draft, model.config)
                save_report(report, draft, say=self.say)
                (draft / TRAINING).write_text(json.dumps(report.settings, indent=2) + "\n")
                if (self.work / LOG).is_file():
                    shutil.copyfile(self.work / LOG, draft / LOG)
                    write_run_report(draft, self.say)
                write_model_card(draft, self.teacher.source)
                write_sums(draft)
        except KeptDraft as kept:
            raise KeptDraft(f"{kept}; the checkpoints are still in {str(self.work)!r}") from kept
        self.held.remove()
        wait_for_all()
