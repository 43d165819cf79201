"""One row: trained, measured, and written to a JSON file of its own after every step of the way."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import scores
from benchmarks.quality.bench import BY_TRIALS, Bench
from benchmarks.quality.branches import switched_off
from benchmarks.quality.next_lines import next_line_scores, read_projects
from benchmarks.quality.oracle import choose_by_labels
from benchmarks.quality.records import write_json
from benchmarks.quality.retrieval_data import WithPasskeys
from benchmarks.quality.rows import TEACHER, RowSpec
from benchmarks.quality.ruler import ruler_scores
from lizard_models.distill import (
    FineTuning,
    RunArguments,
    StageResult,
    held_out_errors,
    train_stage0,
    train_stage1,
    train_stage2,
    train_stage3,
)
from lizard_models.evaluation import PositionLoss, divergence_by_position, loss_by_position, passkey_accuracy
from lizard_models.evaluation.passkey import passkeys_found, shortest_length
from lizard_models.evaluation.restoration import restoration_savings
from lizard_models.files.environment import environment
from lizard_models.files.folders import appear_whole, sha256_of
from lizard_models.files.sources import Say
from lizard_models.files.weights import content_digest
from lizard_models.model.layer_configs import lizard_config
from lizard_models.model.linearize import linearize
from lizard_models.model.widen import widen
from lizard_models.runs.memory import constant_bytes, told_places
from lizard_models.runs.plan import precision
from lizard_models.runs.score_rows import ScoreRows, score_rows
from lizard_models.runs.state_budget import DTYPE, share_out, shared_mib
from lizard_models.teachers.find import load_teacher
from lizard_models.teachers.loading import load_model
from lizard_models.text.look_ups import look_up_rows
from lizard_models.text.sequences import Documents, PackedTokens, documents_of, load_documents, load_sequences

WRITTEN_TOKENS = 1 << 17  # of prompts that are continued together: a step of a batch takes as long as one of a row
AFTER_STAGE1 = ("kl", "found", "passkeys5")  # measured then too: does stage 2 find what stage 1 found?
RESTORE_TOKENS = 2048  # of each document, for the KL that restoring a layer saves


def run_row(spec: RowSpec, bench: Bench, say: Say) -> dict[str, Any]:
    """Trains and measures what the row still lacks and returns its record. Goes on from checkpoints."""
    return _Row(spec, bench, say).finish()


class _Row:
    def __init__(self, spec: RowSpec, bench: Bench, say: Say) -> None:
        self.spec, self.bench, self.say = spec, bench, say
        self.started = time.monotonic()
        self.folder = bench.folder(spec)
        self.num_layers = bench.num_layers()
        self.config = spec.config(bench.budget, self.num_layers)
        dtype = precision(self.config.stage1, bench.device)
        self.teacher = load_teacher(bench.teacher, dtype=dtype, device=bench.device, cache=bench.cache, say=say)
        self.reference = copy.deepcopy(self.teacher.model)  # stage 2 changes the weights that the student shares
        self.documents = self._documents(bench.eval_length, bench.eval_documents)
        settings = bench.settings(spec, self.num_layers)
        found = bench.record(spec, self.num_layers)
        self.record = found or {"settings": settings, "measures": {}, "stages": {}, "hashes": {}, "seconds": 0.0}
        self.before = self.record["seconds"]
        self.record["environment"] = environment() | {"dtype": str(dtype).removeprefix("torch.")}
        self.record["hashes"]["validation"] = self.documents.digest

    def finish(self) -> dict[str, Any]:
        missing = self.bench.missing(self.spec, self.num_layers)
        if not missing:
            return self.record
        model = self._model(missing)
        for measure in missing:
            if measure not in self.record["measures"]:
                self._measure(measure, model)
        return self.record

    def _documents(self, length: int, count: int) -> Documents:
        return load_documents(
            self.bench.eval_data,
            self.teacher.tokenizer,
            length + 1,
            count=count,
            vocab_size=self.teacher.model.config.vocab_size,
        )

    def _model(self, missing: list[str]) -> Any:
        spec, finished = self.spec, self.folder / "model"
        if finished.is_dir():
            self.say(f"{spec.stem}: trained before")
            before: Any = load_model(str(finished), device=self.bench.device).model
            if self.record.get("scores", found := scores.score_sum(before)) != found:
                raise ValueError(
                    f"{finished}: its scores are not those that its record tells of; delete it to train anew"
                )
            return self._foretold(before)
        if spec.preset == TEACHER and not spec.stage2:
            return self.reference
        if self.record[
            "measures"
        ]:  # its model is gone: what is measured now is of another training of the same settings
            self.record["earlier"] = sorted(self.record["measures"])
        config = self.config.replace(wide_layers=[]) if spec.widened else self.config
        model: Any = self._foretold(linearize(self.teacher.model, config).requires_grad_(False))
        scored = len(model.key_scores()) > 0 and self.bench.budget.stage0_steps > 0 and not spec.oracle
        if self.config.attention.keeps_keys and self.config.stage0.share_places and not scored:
            raise ValueError(f"{spec.stem}: places are shared out by fitted scores, and there is no stage 0")
        if scored:
            rows = self._fit_scores(model)
            if shared_mib(model.config, None, scored) is not None:
                self._share_places(model, rows)
        trains = any(True for _ in model.stage_parameters())
        if spec.stage1 and trains and self.bench.budget.stage1_steps:
            result = train_stage1(model, self._sequences("stage1"), self._run_arguments("stage1"))
            self._trained("stage1", result)
            after: dict[str, Any] = {"loss": _plain(self._loss(model))}
            tokens = self.documents.tokens[:, : self.config.stage1.sequence_length]
            errors = held_out_errors(model, tokens, batch_size=4)
            after |= {"relative_error": errors.mean().item(), "layer_errors": errors.tolist()}
            with torch.no_grad():
                after |= {name: getattr(self, f"_{name}_of")(model) for name in AFTER_STAGE1 if name in missing}
            self.record["after_stage1"] = after
            if "restore" in missing:
                self._measure("restore", model)
        if spec.widened:
            widen(model, self.config.wide_layers)
        if spec.stage2 and self.bench.budget.stage2_steps:
            then = self._train_longer if spec.stage3 else None
            sequences = self._sequences("stage2")
            model, result = train_stage2(model, sequences, self._run_arguments("stage2"), None, then)
            if then is None:
                self._trained("stage2", result)
        if scored:
            self.record["scores"] = scores.score_sum(model)
        if spec.stage1 or spec.stage2 or scored:
            with appear_whole(finished) as draft:
                model.save_pretrained(draft)
        return model

    def _train_longer(self, tuning: FineTuning, result: StageResult) -> None:
        """Stage 3, before what stage 2 trained is merged; what it gains is told by the losses before it and after."""
        self._trained("stage2", result)
        self.record["after_stage2"] = {"loss": _plain(self._loss(tuning.model))}
        run = self._run_arguments("stage3")
        run.frozen = content_digest(tuning.learned(), {})
        recipe = self.config.stage3.after(self.config.stage2)
        self._trained("stage3", train_stage3(tuning, self._sequences("stage3"), run, recipe))

    def _foretold(self, model: Any) -> Any:
        """The model, whose keys an oracle chooses if the row has one. Its labels are those of the teacher as it is."""
        if self.spec.oracle:
            if not len(model.key_scores()):
                raise ValueError(f"{self.spec.stem}: an oracle chooses kept keys, and there are none")
            labeller = linearize(self.reference, lizard_config(model.config)).requires_grad_(False)
            choose_by_labels(model, labeller, self.config.stage0)
        return model

    def _share_places(self, model: Any, rows: ScoreRows) -> None:
        """In the bytes of the row's own number of kept keys in every head."""
        mib = constant_bytes(model.config, DTYPE) / 2**20
        share_out(model, rows.asked, mib, self.folder / "kept_keys.json", self.bench.device, self.bench.device)
        self.record["places"] = lizard_config(model.config).to_dict()["attention"]["kept_keys"]
        self.say(f"{self.spec.stem}: {told_places(model.config)}")

    def _fit_scores(self, model: Any) -> ScoreRows:
        rows = score_rows(self.bench.data, self.teacher, model, self.config.stage0)
        self.record["hashes"]["stage0"] = rows.training.digest
        with scores.alone(scores.shared_folder(self.bench.work, model, rows, self.bench.teacher)) as shared:
            if told := scores.take(shared, model):
                self.say(f"{self.spec.stem}: scores are those of {told['row']}")
                self.record["stages"]["stage0"] = told
                self._write()
                return rows
            run = self._run_arguments("stage0")
            result = train_stage0(model, model.key_scores(), rows.training, run, rows.recipe, rows.held_out)
            told = {"r2": result.mean_r2, "r2_by_layer": result.r2, "row": self.spec.stem}
            self._trained("stage0", result, **told, **scores.marks(shared, model))
            scores.give(shared, Path(run.output_dir), self.record["stages"]["stage0"])
        return rows

    def _sequences(self, stage: str) -> Any:
        recipe = getattr(self.config, stage)
        sequences: Any = load_sequences(
            self.bench.data,
            self.teacher.tokenizer,
            recipe.sequence_length,
            seed=recipe.seed,
            examples=None,
            vocab_size=self.teacher.model.config.vocab_size,
        )
        if self.spec.passkeys:
            if not isinstance(sequences, PackedTokens) or self.teacher.tokenizer is None:
                raise ValueError("data: passkeys are mixed into local text, with a teacher that has a tokenizer")
            sequences = WithPasskeys(sequences, self.teacher.tokenizer, self.spec.passkeys, recipe.seed)
        if self.spec.look_ups:
            count = recipe.max_steps * recipe.batch_size
            sequences = look_up_rows(sequences, self.teacher.tokenizer, count, seed=recipe.seed)
        self.record["hashes"][stage] = sequences.digest
        return sequences

    def _run_arguments(self, stage: str) -> RunArguments:
        folder = self.folder / stage
        return RunArguments(
            output_dir=folder,
            resume=folder.is_dir(),
            device=self.bench.device,
            save_steps=200,
            cuda_graph=self.bench.cuda_graph and not self.spec.oracle,  # whose labels are many small steps
            compile=self.bench.compile,
            title=f"{self.spec.stem} {stage}",
        )

    def _trained(self, stage: str, result: Any, **more: Any) -> None:
        self.record["stages"][stage] = {
            "steps": result.steps,
            "seconds": result.seconds,
            "parameters": result.parameters,
            "final_loss": result.final_loss,
            "losses": result.losses[:: max(1, len(result.losses) // 40)],
            **more,
        }
        self._write()

    def _loss(self, model: Any) -> PositionLoss:
        return loss_by_position(model, self.documents.tokens, batch_size=4)

    @torch.no_grad()
    def _measure(self, name: str, model: Any) -> None:
        begun = time.monotonic()
        value = getattr(self, f"_{name}_of")(model)
        if value is not None:
            self.record["measures"][name] = value
        if name in BY_TRIALS:
            self.record.setdefault("trials", {})[name] = self.bench.passkey_trials
        self._write()
        free_memory()  # of what long texts took, for the rows beside this one
        self.say(f"{self.spec.stem}: {name} measured in {time.monotonic() - begun:.0f} s")

    def _write(self) -> None:
        self.record["seconds"] = self.before + time.monotonic() - self.started
        write_json(self.bench.draft_path(self.spec), self.record)

    def _loss_of(self, model: Any) -> dict[str, Any]:
        return _plain(self._loss(model))

    def _kl_of(self, model: Any) -> dict[str, Any]:
        return _plain(divergence_by_position(model, self.reference, self.documents.tokens, batch_size=2))

    def _branches_of(self, model: Any) -> dict[str, Any]:
        losses = {}
        for branch in ("linear", "window"):
            with switched_off(model, branch):  # type: ignore[arg-type]
                losses[f"without_{branch}"] = _plain(self._loss(model))
        return losses

    def _restore_of(self, model: Any) -> dict[str, Any]:
        tokens = self.documents.tokens[:, : RESTORE_TOKENS + 1]
        return restoration_savings(model, self.reference, tokens, batch_size=4)

    def _length_of(self, model: Any) -> dict[str, Any]:
        documents = self._documents(self.bench.long_length, self.bench.eval_documents)
        self.record["hashes"]["length"] = documents.digest
        return _plain(loss_by_position(model, documents.tokens))

    def _source_of(self, model: Any) -> dict[str, Any]:
        tokenizer, length = self._tokenizer("source"), self.bench.long_length + 1
        vocabulary = self.teacher.model.config.vocab_size
        documents = documents_of(self._projects(), tokenizer, length, self.bench.eval_documents, vocabulary)
        return _plain(loss_by_position(model, documents.tokens))

    def _projects(self) -> list[str]:
        assert self.bench.source is not None
        self.record["hashes"]["source"] = sha256_of(self.bench.source)
        return read_projects(self.bench.source)

    def _passkey_of(self, model: Any) -> dict[str, float]:
        return self._passkeys(model, keys=1)

    def _passkeys5_of(self, model: Any) -> dict[str, float]:
        return self._passkeys(model, keys=5)

    def _passkeys(self, model: Any, keys: int) -> dict[str, float]:
        lengths, trials = self.bench.passkey_lengths, self.bench.passkey_trials
        tokenizer = self._tokenizer("passkeys")
        least = shortest_length(tokenizer, keys)
        lengths = [length for length in lengths if length >= least]
        found = passkey_accuracy(model, tokenizer, lengths, trials=trials, keys=keys, batch_tokens=1 << 15)
        return {str(length): share for length, share in found.items()}

    def _found_of(self, model: Any) -> dict[str, dict[str, float]]:
        lengths, trials = self.bench.found_lengths, self.bench.passkey_trials
        documents = self._documents(max(lengths), self.bench.eval_documents)
        self.record["hashes"]["found"] = documents.digest
        tokenizer = self._tokenizer("passkeys")
        found = {}
        for kind, texts in (("filler", None), ("novel", documents.tokens)):
            shares = passkeys_found(model, tokenizer, lengths, trials=trials, texts=texts, batch_tokens=1 << 14)
            found[kind] = {str(length): share for length, share in shares.items()}
        return found

    def _ruler_of(self, model: Any) -> dict[str, dict[str, float]]:
        lengths, trials = self.bench.ruler_lengths, self.bench.passkey_trials
        return ruler_scores(model, self._tokenizer("ruler"), lengths, trials=trials, batch_tokens=WRITTEN_TOKENS)

    def _lines_of(self, model: Any) -> dict[str, float]:
        lengths, sizes = self.bench.line_lengths, {"trials": self.bench.line_trials, "batch_tokens": WRITTEN_TOKENS}
        return next_line_scores(model, self._tokenizer("lines"), self._projects(), lengths, **sizes)

    def _tokenizer(self, measure: str) -> Any:
        if self.teacher.tokenizer is None:
            raise ValueError(f"measures: {measure} needs the teacher's tokenizer")
        return self.teacher.tokenizer

    def _tasks_of(self, model: Any) -> None:
        from benchmarks.quality.tasks.requests import Requests, score

        assert self.bench.requests is not None
        requests = Requests.load(self.bench.requests)
        scores = score(model, requests, say=self.say)
        path = self.bench.scores_path(self.spec)
        path.parent.mkdir(parents=True, exist_ok=True)
        scores.save(path)
        self.record["hashes"]["requests"] = requests.digest


def _plain(loss: PositionLoss) -> dict[str, Any]:
    return dataclasses.asdict(loss)


def main() -> None:
    """Runs the rows that come on standard input, one a line: {"bench": ..., "row": ...}.

    Answers each with a line {"row": stem, "fate": ..., "message": ...} on standard output; all else goes to standard
    error. Ends with its input, and after an error that may have left the device unusable.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        bench, spec = Bench.from_json(json.dumps(job["bench"])), RowSpec(**job["row"])
        failure = ""
        usable = True
        try:
            run_row(spec, bench, lambda message: print(message, flush=True))
        except Exception as error:
            traceback.print_exc()
            failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            usable = isinstance(error, ValueError | FloatingPointError)
        fate = {"row": spec.stem, "fate": "failed" if failure else "finished", "message": failure}
        print(json.dumps(fate), file=answers, flush=True)
        if not usable:
            sys.exit(1)
        free_memory()


def free_memory() -> None:
    """Hands memory that is not in use back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
