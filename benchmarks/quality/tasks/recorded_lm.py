"""lm-eval's side of recorded requests: tasks from local files, the model that records, and metrics from scores."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager, get_task_dict
from transformers import PreTrainedTokenizerBase

from benchmarks.quality.tasks.requests import Pair, Requests, Scores
from lizard_models.text.text_start import text_start, without_start

ROTATIONS = 4
FEWSHOT_SEED = 1234  # as simple_evaluate has it
FEWSHOT = {"mmlu": 5, "mmlu_letters": 5}
SETS = ("piqa", "hellaswag", "arc_easy", "lambada_openai", "mmlu")


class RecordedLM(TemplateLM):
    """A model that notes every likelihood request, and answers from scores if it has them.

    Raises ValueError where scores lack a request, and NotImplementedError for tasks that generate.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self.start = text_start(tokenizer)
        self.pairs: list[Pair] = []
        self.encoded: dict[str, list[int]] = {}
        self.answers: dict[bytes, tuple[float, bool]] = {}

    def answer_from(self, requests: Requests, scores: Scores) -> None:
        """From now on it answers with these scores. Raises what ``answers_of`` does."""
        self.answers = answers_of(requests, scores)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """As HFLM's: what stands before a continuation without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids as HFLM encodes for causal models: after what the tokenizer puts before a text, once, unless the caller
        wants none."""
        if string not in self.encoded:
            if len(self.encoded) > 64:  # options of one context follow each other
                self.encoded.clear()
            self.encoded[string] = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        ids = self.encoded[string]
        return ids if add_special_tokens is False else [*self.start, *without_start(ids, self.start)]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        if not self.answers:
            self.pairs += [(context, continuation) for _, context, continuation in requests]
            return [(0.0, False)] * len(requests)
        keys = [_key(context, continuation) for _, context, continuation in requests]
        if missing := sum(key not in self.answers for key in keys):
            raise ValueError(f"scores: {missing} of {len(keys)} requests have no answer; record the requests again")
        return [self.answers[key] for key in keys]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("recorded requests are likelihoods of continuations")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("recorded requests are likelihoods of continuations")


def answers_of(requests: Requests, scores: Scores) -> dict[bytes, tuple[float, bool]]:
    """Log-likelihood and greediness by a digest of the pair. Raises ValueError for scores of other requests."""
    if scores.digest != requests.digest:
        raise ValueError("scores: they answer other requests than the ones given")
    pairs = ((requests.context(requests.context_of[i]), requests.continuation(i)) for i in range(len(requests)))
    values = zip(scores.log_likelihoods.tolist(), scores.greedy.tolist(), strict=True)
    return {_key(*pair): value for pair, value in zip(pairs, values, strict=True)}


def _key(context: Any, continuation: Any) -> bytes:
    digest = hashlib.blake2b(np.asarray(context, np.int32).tobytes(), digest_size=16)
    digest.update(b"|" + np.asarray(continuation, np.int32).tobytes())
    return digest.digest()


def write_tasks(data: Path, folder: Path, sets: Sequence[str] = SETS) -> dict[str, list[str]]:
    """Task files for lm-eval that read local JSON lines instead of the hub. Returns the task names of each set.

    data: a folder with piqa/, hellaswag/, arc_easy/, lambada_openai/ and mmlu/ (dev.jsonl, test.jsonl). sets: of those,
    and ``mmlu_letters``: MMLU scored by the letter, with the options of every question rotated by 0 to 3 places.
    Raises ValueError for another set or a file that is not there.
    """
    import lm_eval

    packaged = Path(lm_eval.__file__).parent / "tasks"
    plain = {
        "piqa": (packaged / "piqa" / "piqa.yaml", "validation", "validation"),
        "hellaswag": (packaged / "hellaswag" / "hellaswag.yaml", "validation", "validation"),
        "arc_easy": (packaged / "arc" / "arc_easy.yaml", "test", "test"),
        "lambada_openai": (packaged / "lambada" / "lambada_openai.yaml", "test", "test"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, list[str]] = {}
    for name in sets:
        if name in plain:
            include, split, stem = plain[name]
            file = _existing(data / name / f"{stem}.jsonl")
            splits: dict[str, str | None] = {key: None for key in ("training_split", "validation_split", "test_split")}
            splits[f"{split}_split"] = split
            task = {"include": str(include), "task": f"local_{name}", "dataset_path": "json", "dataset_name": None}
            _write_task(folder, task | splits | {"dataset_kwargs": {"data_files": {split: str(file)}}})
            names[name] = [f"local_{name}"]
        elif name == "mmlu":
            template = packaged / "mmlu" / "continuation" / "_continuation_template_yaml"
            names[name] = _write_mmlu(data / "mmlu", folder, "mmlu", template, 0)
        elif name == "mmlu_letters":
            template = packaged / "mmlu" / "default" / "_default_template_yaml"
            names[name] = [
                task
                for turn in range(ROTATIONS)
                for task in _write_mmlu(data / "mmlu", folder, f"letters{turn}", template, turn)
            ]
        else:
            raise ValueError(f"sets: no {name!r}; known are {', '.join(SETS)} and mmlu_letters")
    return names


def _write_mmlu(data: Path, folder: Path, kind: str, template: Path, turn: int) -> list[str]:
    records: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for split in ("dev", "test"):
        for line in _existing(data / f"{split}.jsonl").read_text().strip().split("\n"):
            record = json.loads(line)
            if split == "test":
                record = rotated(record, turn)
            records.setdefault(record["subject"], {"dev": [], "test": []})[split].append(record)
    names = []
    for subject, splits in sorted(records.items()):
        files = {}
        for split, rows in splits.items():
            path = folder / f"{kind}_{subject}_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files[split] = str(path)
        task: dict[str, Any] = {
            "include": str(template),
            "task": f"local_{kind}_{subject}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "description": f"The following are questions (with answers) about {subject.replace('_', ' ')}.\n\n",
        }
        if kind != "mmlu":
            task["description"] = task["description"].replace("are questions", "are multiple choice questions")
        _write_task(folder, task)
        names.append(task["task"])
    return names


def rotated(record: dict[str, Any], turn: int) -> dict[str, Any]:
    """A multiple-choice record whose options stand ``turn`` places later, the answer with them."""
    count = len(record["choices"])
    choices = [record["choices"][(i - turn) % count] for i in range(count)]
    return record | {"choices": choices, "answer": (record["answer"] + turn) % count}


def _write_task(folder: Path, task: dict[str, Any]) -> None:
    (folder / f"{task['task']}.yaml").write_text(json.dumps(task, indent=1) + "\n")  # JSON is YAML


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"data: {str(path)!r} is not there")
    return path.resolve()


def record_requests(
    data: Path, tokenizer: PreTrainedTokenizerBase, sets: Sequence[str] = SETS, limit: int | None = None
) -> Requests:
    """What lm-eval asks a model about local sets. data: see ``write_tasks``; sets and limit: ``split_limits``."""
    lm, limits = RecordedLM(tokenizer), split_limits(sets, limit)
    with tempfile.TemporaryDirectory() as folder:
        evaluate(lm, Path(folder), write_tasks(data, Path(folder), list(limits)), limits)
    return Requests.from_pairs(lm.pairs)


def metrics_of(
    scores: Iterable[Scores],
    data: Path,
    tokenizer: PreTrainedTokenizerBase,
    requests: Requests,
    sets: Sequence[str] = SETS,
    limit: int | None = None,
) -> Iterator[dict[str, Any]]:
    """lm-eval's metrics of each model's scores, see ``evaluate``; the other arguments as the requests were recorded."""
    limits = split_limits(sets, limit)
    with tempfile.TemporaryDirectory() as folder:
        asked = AskedTasks(tokenizer, Path(folder), write_tasks(data, Path(folder), list(limits)), limits)
    for one in scores:
        yield asked.metrics(answers_of(requests, one))


class AskedTasks:
    """Tasks whose requests are built and tokenised once, for lm-eval's metrics of many models.

    folder, names: of ``write_tasks``; limits: documents a task of a set.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        names: dict[str, list[str]],
        limits: dict[str, int | None],
    ) -> None:
        self.names = names
        self.questions: dict[str, list[tuple[Any, Any, list[bytes]]]] = {}  # task -> (task, document, keys)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        for name, tasks in names.items():
            loaded = get_task_dict(list(tasks), manager)
            for task_name in tasks:
                task = loaded[task_name]
                task.set_config(key="num_fewshot", value=FEWSHOT.get(name, 0))
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                task.build_all_requests(limit=limits.get(name), rank=0, world_size=1)
                lm = RecordedLM(tokenizer)
                lm.loglikelihood(task.instances, disable_tqdm=True)
                documents: dict[int, tuple[Any, Any, list[bytes]]] = {}
                for instance, pair in zip(task.instances, lm.pairs, strict=True):
                    documents.setdefault(instance.doc_id, (task, instance.doc, []))[2].append(_key(*pair))
                self.questions[task_name] = list(documents.values())

    def metrics(self, answers: dict[bytes, tuple[float, bool]]) -> dict[str, Any]:
        """As ``evaluate`` gives them. Raises ValueError where a request has no answer."""
        samples: dict[str, list[dict[str, Any]]] = {}
        for name, questions in self.questions.items():
            samples[name] = []
            for task, document, keys in questions:
                if any(key not in answers for key in keys):
                    raise ValueError(f"scores: a request of {name} has no answer; record the requests again")
                responses = [answers[key] for key in keys]
                samples[name].append({**task.process_results(document, responses), "filtered_resps": responses})
        return {
            key: value for name, tasks in self.names.items() for key, value in _summaries(name, tasks, samples).items()
        }


def split_limits(sets: Sequence[str], limit: int | None = None) -> dict[str, int | None]:
    """ "piqa" or "mmlu_letters:10" as the name of a set and the documents of each of its tasks; else ``limit``.

    Raises ValueError for a limit that is not a positive number.
    """
    found: dict[str, int | None] = {}
    for text in sets:
        name, colon, number = text.partition(":")
        if colon and not (number.isdigit() and int(number)):
            raise ValueError(f"sets: {text!r}, wanted a name, or a name and a number of documents such as {name}:10")
        found[name] = int(number) if colon else limit
    return found


def evaluate(
    lm: TemplateLM, folder: Path, names: dict[str, list[str]], limits: dict[str, int | None] | None = None
) -> dict[str, Any]:
    """Metrics of every set through lm-eval, with standard errors, ties, and letters where letters are scored.

    folder, names: of ``write_tasks``. limits: documents a task of a set, all by default. A set of several tasks (MMLU's
    subjects) is the mean over all of its documents.
    """
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results: dict[str, Any] = {}
    for name, tasks in names.items():
        found = simple_evaluate(
            model=lm,
            tasks=tasks,
            num_fewshot=FEWSHOT.get(name, 0),
            limit=(limits or {}).get(name),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
        )
        results |= _summaries(name, tasks, found["samples"])
    return results


def _summaries(name: str, tasks: list[str], samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    if name != "mmlu_letters":
        return {name: _summary([sample for task in tasks for sample in samples[task]])}
    summaries = {}
    for turn in range(ROTATIONS):
        chosen = [sample for task in tasks if f"_letters{turn}_" in task for sample in samples[task]]
        if chosen:
            summaries[f"mmlu_letters{turn}"] = _summary(chosen, letters=True)
    return summaries


def _summary(samples: list[dict[str, Any]], letters: bool = False) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for metric in ("acc", "acc_norm"):
        if metric in samples[0]:
            values = np.array([float(sample[metric]) for sample in samples])
            metrics[metric] = values.mean()
            metrics[f"{metric}_stderr"] = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    if "perplexity" in samples[0]:
        metrics["perplexity"] = math.exp(-sum(sample["perplexity"] for sample in samples) / len(samples))
    metrics["documents"] = len(samples)
    options = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
    if len(options[0]) > 1:
        metrics["ties"] = sum(sorted(scores)[-1] == sorted(scores)[-2] for scores in options)
    if letters:
        chosen = [int(np.argmax(scores)) for scores in options]
        metrics["letters"] = {letter: chosen.count(i) for i, letter in enumerate("ABCD")}
    return {key: float(value) if isinstance(value, np.floating) else value for key, value in metrics.items()}
