"""The keys of a recipe file: what of a ``Plan`` each one sets, its type, its default and its documentation.

Types, defaults and documentation are those of the fields of ``Plan``, ``LizardConfig``, ``AttentionChoices`` and the
stages' recipes. Here is only where in a file each of them stands.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import textwrap
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from lizard_layers import AttentionChoices
from lizard_models.config import LizardConfig
from lizard_models.presets import PRESETS
from lizard_models.recipes import Stage0Config, Stage1Config, Stage2Config, Stage3Config
from lizard_models.runs.plan import Plan

SECTIONS = {
    "": "What to make of which teacher.",
    "data": "Training text, read by all stages.",
    "attention": "What a converted layer computes.",
    "budget": "Where memory goes: kept keys, layers with a wider window, layers kept softmax.",
    "stage0": "Scores of the keys that are kept; without kept keys there is nothing to fit.",
    "stage1": "The new parameters imitate the teacher's attention.",
    "stage2": "The whole is fine-tuned.",
    "stage3": "Stage 2 gone on with on longer rows: the same adapters and loss, other rows and rates.",
    "evaluation": "What is measured before, between and after the stages, beside the teacher and the window control.",
    "training": "How this machine does it.",
}
"""Sections of a file in their order, and what they are about. Keys of "" stand outside of any."""

FROM_PLAN = {
    "teacher": "teacher",
    "out": "out",
    "from": "start",
    "data.sources": "data",
    "data.weights": "weights",
    "data.text_field": "text_field",
    "data.encoding": "encoding",
    "budget.state_mib": "state_mib",
    "budget.widen": "widen",
    "stage0.run": "stage0",
    "stage1.run": "stage1",
    "stage2.run": "stage2",
    "stage3.run": "stage3",
    "evaluation.data": "eval_data",
    "evaluation.length": "eval_length",
    "evaluation.documents": "eval_documents",
    "evaluation.passkey_lengths": "passkey_lengths",
    "evaluation.passkey_trials": "passkey_trials",
    "training.dtype": "dtype",
    "training.device": "device",
    "training.micro_batch_size": "micro_batch_size",
    "training.gradient_checkpointing": "gradient_checkpointing",
    "training.fsdp": "fsdp",
    "training.context_parallel": "context_parallel",
    "training.cuda_graph": "cuda_graph",
    "training.compile": "compile",
    "training.save_steps": "save_steps",
    "training.report_to": "report_to",
    "training.diverged": "diverged",
    "training.log_attention_every": "log_attention_every",
    "training.peak_tflops": "peak_tflops",
    "training.cache": "cache",
}
"""Fields of ``Plan`` by key. All but ``config``, whose fields are keys themselves, and ``resume``."""

IN_BUDGET = (
    "attention.kept_keys",
    "softmax_layers",
    "softmax_share",
    "keep_sliding_layers",
    "wide_layers",
    "wide_window",
    "wide_gate_stretch",
)
"""Fields of ``LizardConfig`` that stand in the section ``budget``; others stand where they stand there."""

NO_KEYS = ("name", "attention", "stage0", "stage1", "stage2", "stage3", "dataset")  # ``name`` is told apart below

HINTS: dict[str, Any] = {
    "out": str,
    "from": str | None,
    "data.sources": tuple[str, ...] | None,
    "data.weights": tuple[float, ...],
    "evaluation.data": tuple[str, ...],
    "evaluation.passkey_lengths": tuple[int, ...],
    "training.dtype": Literal["float32", "bfloat16"] | None,
    "training.device": Literal["cpu", "cuda"] | None,
}
"""Types of values in a file where a ``Plan`` holds others."""

LEAST = {
    "budget.state_mib": 0,
    "budget.widen": 0,
    "evaluation.length": 2,
    "evaluation.documents": 1,
    "evaluation.passkey_lengths": 1,
    "evaluation.passkey_trials": 1,
    "training.micro_batch_size": 1,
    "training.save_steps": 1,
    "training.log_attention_every": 0,
}
"""Smallest values of what a ``Plan`` does not check itself."""

DEFAULTS = {"evaluation.length": 4096}  # as of ``lizard-attn linearize``

UNSET: Any = object()


@dataclass(frozen=True)
class Key:
    """One key of a recipe file."""

    name: str  # with its section, as stage1.max_steps
    target: tuple[str, ...]  # of a plan's attributes, ("config", "stage1", "max_steps")
    hint: Any
    doc: str
    default: Any = UNSET  # where the preset says it, and where the key must be given

    @property
    def section(self) -> str:
        """The section's name, "" outside of any."""
        return self.name.rpartition(".")[0]

    @property
    def of_config(self) -> bool:
        """Whether it sets a field of the plan's configuration."""
        return self.target[0] == "config"


@functools.cache
def keys() -> dict[str, Key]:
    """Every key by its name, in the order of a complete file."""
    found = [
        Key("preset", ("preset",), Literal[tuple(PRESETS)], "Preset that gives the values of keys that are left out.",
            "recommended"),
        Key("name", ("config", "name"), str | None, "What reports call the result; None is the preset's name.", None),
    ]  # fmt: skip
    of_plan, docs = {f.name: f for f in fields(Plan)}, documentation(Plan)
    hints = get_type_hints(Plan)
    for name, attribute in FROM_PLAN.items():
        doc = docs[attribute]
        if name == "data.sources":
            doc += " None takes the preset's data set."
        default = DEFAULTS.get(name, None if name == "data.sources" else _default(of_plan[attribute]))
        found.append(Key(name, (attribute,), HINTS.get(name, hints[attribute]), doc, default))
    kinds: dict[str, Any] = {"attention": AttentionChoices}
    kinds |= {"stage0": Stage0Config, "stage1": Stage1Config, "stage2": Stage2Config, "stage3": Stage3Config}
    for section, kind in {"": LizardConfig, **kinds}.items():
        hints, docs = get_type_hints(kind), documentation(kind)
        for attribute in (f.name for f in fields(kind) if f.name not in NO_KEYS):
            target = f"{section}.{attribute}".removeprefix(".")
            name = f"budget.{attribute}" if target in IN_BUDGET else target
            found.append(Key(name, ("config", *target.split(".")), hints[attribute], docs[attribute]))
    found.sort(key=lambda key: key.name != "budget.kept_keys")  # before the budget that may take its place
    return {key.name: key for section in SECTIONS for key in found if key.section == section}


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return UNSET if field.default is MISSING else field.default


def required() -> list[str]:
    """Keys that no preset gives."""
    return [key.name for key in keys().values() if not key.of_config and key.default is UNSET]


@functools.cache
def documentation(kind: Any) -> dict[str, str]:
    """What the string under each field of a dataclass says, in one line; of a base's field too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def wanted(hint: Any, plural: bool = False) -> str:
    """A type in words, as "a whole number or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ("" if plural else "one of ") + ", ".join(map(str, args))
    if origin is tuple:
        length = "" if args[-1] is Ellipsis else f"{len(args)} "
        return f"{'lists' if plural else 'a list'} of {length}{wanted(args[0], plural=True)}"
    if args:
        return " or ".join(wanted(arg, plural) for arg in args)
    one, many = {
        bool: ("true or false", "truths"),
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        str: ("a text", "texts"),
        type(None): ("null", "nulls"),
    }[hint]
    return many if plural else one


def written(value: Any) -> str:
    """A value as it stands in a file."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{written(key)}: {written(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, float):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # readers of YAML 1.1 take 1e-3 for a text
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_~./][\w./~-]*", value, re.ASCII)
        return value if plain and yaml.safe_load(value) == value else json.dumps(value, ensure_ascii=False)
    return json.dumps(value, default=repr)
