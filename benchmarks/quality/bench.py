"""Where a benchmark's rows are trained, measured and written. One object that every process of a run shares."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quality.records import merge_records, read_record
from benchmarks.quality.rows import MEASURES, TEACHER, Budget, RowSpec
from lizard_models.config import LizardConfig
from lizard_models.teachers.find import find_teacher

BY_TRIALS = ("found", "passkey", "passkeys5", "ruler")  # shares of so many prompts a length
TRIALS = 20  # where a record does not say how many


def trials_of(record: dict[str, Any], measure: str) -> int:
    """Prompts a length of one of ``BY_TRIALS``."""
    return record.get("trials", {}).get(measure, TRIALS)


@dataclass(kw_only=True)
class Bench:
    """Teacher, data, folders and what to measure."""

    teacher: str
    data: list[str]
    eval_data: list[str]
    budget: Budget
    out: Path
    """Folder of the results; finished rows go into a file of the budget's name in it."""
    work: Path
    """Folder of models, checkpoints and records under way, which may be deleted when the rows are finished."""
    measures: list[str] = field(default_factory=lambda: ["loss", "kl", "branches"])
    eval_length: int = 4096
    eval_documents: int = 8
    long_length: int = 65_536
    passkey_lengths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16_384])
    passkey_trials: int = TRIALS
    """Keys a length. Lengths that cannot hold five keys of five to eight digits are left out of ``passkeys5``."""
    found_lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096, 8192])
    """Of the measure ``found``, which reads a prompt once and takes no cache."""
    ruler_lengths: list[int] = field(default_factory=lambda: [4096, 8192, 16_384, 32_768])
    source: Path | None = None
    """held_out.jsonl of ``code-data``, for the measures ``source`` and ``lines``."""
    line_lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192])
    line_trials: int = 200
    requests: Path | None = None
    """File of task requests, for the measure ``tasks``."""
    device: str = "cpu"
    cuda_graph: bool = False
    """Train with every step as one CUDA graph, see ``RunArguments``."""
    compile: bool = False
    """Train with MLPs and norms compiled, see ``RunArguments``."""
    cache: str | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.measures) - set(MEASURES)):
            raise ValueError(f"measures: no {', '.join(unknown)}; known are {', '.join(MEASURES)}")
        if "tasks" in self.measures and self.requests is None:
            raise ValueError("measures: tasks needs a file of requests (--requests)")
        for measure in ("source", "lines"):
            if measure in self.measures and self.source is None:
                raise ValueError(f"measures: {measure} needs held-out source (--source)")

    @property
    def results(self) -> Path:
        """File of the finished rows, one record a line."""
        return self.out / f"{self.budget.name}.jsonl"

    @property
    def scores(self) -> Path:
        """Folder of the rows' answers to the task requests."""
        return self.out / "scores" / self.budget.name

    def folder(self, spec: RowSpec) -> Path:
        """Folder of a row's model and checkpoints."""
        return self.work / self.budget.name / spec.stem

    def draft_path(self, spec: RowSpec) -> Path:
        """A row's record while it is under way: a file of its own, which a process that is killed leaves whole."""
        return self.folder(spec) / "record.json"

    def scores_path(self, spec: RowSpec) -> Path:
        """The row's answers to the task requests."""
        return self.scores / f"{spec.stem}.npz"

    def num_layers(self) -> int:
        """Layers of the teacher."""
        return find_teacher(self.teacher, cache=self.cache)[1].num_hidden_layers

    def settings(self, spec: RowSpec, num_layers: int) -> dict[str, Any]:
        """What a row's numbers depend on, as far as it is known before it runs."""
        return {
            "teacher": self.teacher,
            "row": dataclasses.asdict(spec),
            "budget": dataclasses.asdict(self.budget),
            "config": spec.config(self.budget, num_layers).to_dict(),
            "data": [Path(source).name for source in self.data],
        }

    def records(self, spec: RowSpec) -> list[dict[str, Any]]:
        """What is written about a row, whatever its settings: the record under way, then the finished one."""
        path = self.draft_path(spec)
        found = [json.loads(path.read_text())] if path.is_file() else []
        finished = read_record(self.results, spec.stem)
        return found if finished is None else [*found, finished]

    def record(self, spec: RowSpec, num_layers: int) -> dict[str, Any] | None:
        """The row as far as it is finished, None if there is none with these settings."""
        wanted = self.settings(spec, num_layers)
        return next((r for r in self.records(spec) if same_settings(wanted, r["settings"])), None)

    def publish(self, spec: RowSpec, num_layers: int) -> None:
        """Moves the record under way, if there is one with these settings, into the file of the finished rows.

        For the one process that gives rows to the others and knows that this one has ended.
        """
        path = self.draft_path(spec)
        if path.is_file():
            draft = json.loads(path.read_text())
            if same_settings(draft["settings"], self.settings(spec, num_layers)):
                merge_records(self.results, {spec.stem: draft})
                path.unlink()

    def missing(self, spec: RowSpec, num_layers: int) -> list[str]:
        """The measures that the row still lacks, or has of fewer prompts, in the order in which they were asked for."""
        record = self.record(spec, num_layers)
        config = spec.config(self.budget, num_layers)
        wanted = [m for m in self.measures if applies(m, spec, config)]
        done = set(record["measures"]) if record else set()
        done -= {m for m in BY_TRIALS if record and trials_of(record, m) < self.passkey_trials}
        if record and self.scores_path(spec).is_file():
            done.add("tasks")
        return [m for m in wanted if m not in done]

    def to_json(self) -> str:
        """The inverse of ``from_json``."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Bench:
        """A bench in another process."""
        values = json.loads(text)
        values["budget"] = Budget(**values["budget"])
        for name in ("out", "work", "requests", "source"):
            values[name] = None if values[name] is None else Path(values[name])
        return cls(**values)


WINDOW_FIELDS = ("linear_branch", "window", "window_rope", "anchors", "positions", "position_limit", "position_step",
                 "num_sinks", "sinks_per_head", "sink_form", "sink_init", "sink_spread")  # fmt: skip
OF_CONFIG = ("name", "preset", "changes", "longer", "stage3_longer")  # of a row, what its configuration says


def _completed(settings: dict[str, Any]) -> Any:
    """Settings with the defaults of fields that did not exist when they were written; None for unreadable ones.

    Of the row what its configuration does not say: which preset with which changes that is does not matter. A stage
    that the row leaves out is left out, and stage 0 where no keys are kept; so is what converted layers would compute
    for a teacher, which has none, and what the linear branch of a window alone would be; and how many queries' labels
    are made at a time, which changes none.
    """
    try:
        config = LizardConfig.from_dict(settings["config"]).to_dict()
        row = dataclasses.asdict(RowSpec(**settings["row"]))
        budget = dataclasses.asdict(Budget(**settings["budget"]))
        if row["preset"] == TEACHER or not config["attention"]["kept_keys"] or not budget["stage0_steps"]:
            del budget["stage0_steps"], config["stage0"]
        if row["preset"] == TEACHER:
            del config["attention"]
        elif not config["attention"]["linear_branch"]:
            config["attention"] = {key: config["attention"][key] for key in WINDOW_FIELDS}
        for stage in ("stage1", "stage2", "stage3"):
            if not row[stage]:
                del config[stage]
        config.get("stage0", {}).pop("label_block", None)
        row = {key: value for key, value in row.items() if key not in OF_CONFIG}
        del config["name"]
    except (TypeError, ValueError):
        return None
    return json.loads(json.dumps({**settings, "config": config, "row": row, "budget": budget}))


def same_settings(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are of one row: fields that did not exist when one was written have their defaults."""
    return (settings := _completed(one)) is not None and settings == _completed(other)


def applies(measure: str, spec: RowSpec, config: LizardConfig) -> bool:
    """Whether a measure says anything about a row: branches and restoration need a linear branch, an oracle needs whole
    texts."""
    if spec.oracle and measure not in ("loss", "kl", "branches", "found"):
        return False
    if measure in ("branches", "restore"):
        return spec.preset != TEACHER and config.attention.linear_branch
    return measure != "kl" or spec.preset != TEACHER or spec.stage2
