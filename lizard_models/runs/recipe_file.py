"""Recipe files: YAML that is read as a ``Plan``, every mistake named by file, line and key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
import yaml

from lizard_layers.config import tuples
from lizard_layers.field_types import allows
from lizard_models.config import LizardConfig
from lizard_models.recipes import MOST
from lizard_models.runs.plan import Plan
from lizard_models.runs.recipe_keys import LEAST, SECTIONS, Key, keys, required, wanted
from lizard_models.runs.recipe_show import preset_data

NOT_THERE = {
    "resume": "a recipe always goes on with what there is; leave the key out",
    "stage0.dataset": "the text of all stages is data.sources",
    "stage1.dataset": "the text of all stages is data.sources",
    "stage2.dataset": "the text of all stages is data.sources",
    "stage3.dataset": "the text of all stages is data.sources",
}
"""Keys that one could look for, and what to do without them."""

SHOWN = 80  # characters of a wrong value


class RecipeError(ValueError):
    """A recipe file that is refused: ``faults`` has a line for each mistake."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        more = f" (and {len(faults) - 1} more: lizard-attn recipe validate {path})" if len(faults) > 1 else ""
        super().__init__(faults[0] + more)
        self.faults = faults


class _Loader(yaml.SafeLoader):
    """YAML with the plain scalars of its version 1.2: no is a text, 1e-3 a number, 010 neither octal nor ten."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's. Raises ComposerError for an alias, which could stand for endlessly many values."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*) are not read, write it out", mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
              r"|\.(?:nan|NaN|NAN)", list("-+0123456789.")),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_recipe(path: Path) -> Plan:
    """The plan that a recipe file describes, which goes on with what there is of it (``resume="auto"``).

    Relative paths in it are relative to the current folder, as on the command line. Only the file is looked at, and the
    folder of ``from`` if it names one.

    Raises RecipeError, a ValueError, with all mistakes by file, line and key: what came and what was wanted.
    """
    return _Reader(path).plan()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[tuple[int, str]] = []
        self.lines: dict[str, int] = {}  # of keys and sections
        self.values: dict[str, Any] = {}

    def plan(self) -> Plan:
        root = self._root()
        self._read(root, "")
        for name in required():
            if name not in self.lines:
                self._fault(name, f"is missing, wanted {wanted(keys()[name].hint)}")
        if "stage3.run" not in self.lines and (given := [key for key in self.values if key.startswith("stage3.")]):
            self._fault(given[0], "stage 3 is left out unless stage3.run is true; say so, or that it is false")
        self._stop_if_faulty()
        config = self._config()
        self._stop_if_faulty()
        plan = self._plan(config)
        self._stop_if_faulty()
        return plan

    def _fault(self, name: str, what: str, line: int | None = None) -> None:
        line = self.lines.get(name, 0) if line is None else line
        at = f"{self.path}:{line}" if line else str(self.path)
        self.faults.append((line, f"{at}: {name}: {what}" if name else f"{at}: {what}"))

    def _stop_if_faulty(self) -> None:
        if self.faults:
            raise RecipeError(self.path, [text for _, text in sorted(self.faults)])

    def _root(self) -> yaml.MappingNode:
        try:
            self.text = self.path.read_bytes().decode("utf-8-sig")
            self.loader = _Loader(self.text)
            root = self.loader.get_single_node()
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            self._fault("", f"is not UTF-8 ({error.reason}), wanted a recipe", line)
        except RecursionError:
            self._fault("", "is nested too deeply, wanted sections with keys")
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            what = getattr(error, "problem", None) or " ".join(str(error).split())
            self._fault("", f"is not YAML: {what}", mark.line + 1 if mark else None)
        else:
            if isinstance(root, yaml.MappingNode):
                return root
            what = "is empty" if root is None else "holds no keys"
            self._fault("", f"{what}, wanted a recipe such as lizard-attn recipe show recommended prints")
        self._stop_if_faulty()
        raise AssertionError("unreachable")

    def _read(self, section: yaml.MappingNode, prefix: str) -> None:
        """Reads what a section holds."""
        for key, node in section.value:
            line = key.start_mark.line + 1
            name = prefix + (key.value if isinstance(key, yaml.ScalarNode) else "?")
            if name in self.lines:
                self._fault(name, f"is given twice, first in line {self.lines[name]}; wanted it once", line)
                continue
            self.lines[name] = line
            if not prefix and name in SECTIONS and name:
                if isinstance(node, yaml.MappingNode):
                    self._read(node, f"{name}.")
                elif self._value(name, node) is not None:
                    self._fault(name, f"got {self._came(node)}, wanted a section of keys")
            elif name in keys() and keys()[name].section == prefix.rstrip("."):
                self._check(keys()[name], node)
            else:
                self._fault(name, _unknown(name, prefix))

    def _check(self, key: Key, node: yaml.Node) -> None:
        """Keeps a value that its key allows."""
        before, value = len(self.faults), self._value(key.name, node)
        least = LEAST.get(key.name)
        if len(self.faults) > before:
            return
        if isinstance(value, bool) and node.value in get_args(key.hint):
            value = node.value  # the word true, which is one of those that the key takes
        if not allows(key.hint, value):
            self._fault(key.name, f"got {self._came(node)}, wanted {wanted(key.hint)}")
        elif not all(_is_usual(each) for each in _numbers(value)):
            self._fault(key.name, f"got {self._came(node)}, wanted finite numbers below 2**48")
        elif least is not None and any(each < least for each in _numbers(value)):
            self._fault(key.name, f"got {self._came(node)}, wanted {wanted(key.hint)}, at least {least}")
        elif key.name == "data.sources" and value == ():
            self._fault(key.name, f"got {self._came(node)}, wanted files, folders or data sets of the hub")
        else:
            self.values[key.name] = value

    def _value(self, name: str, node: yaml.Node) -> Any:
        try:
            return tuples(self.loader.construct_object(node, deep=True))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            what = getattr(error, "problem", None) or str(error)
            self._fault(name, f"got {self._came(node)}, which cannot be read: {what}")
            return None

    def _came(self, node: yaml.Node) -> str:
        """What stands in the file, in one line."""
        text = " ".join(self.text[node.start_mark.index : node.end_mark.index].split())
        return (text if len(text) <= SHOWN else f"{text[:SHOWN]}...") or "nothing"

    def _config(self) -> LizardConfig:
        """The preset with what the file changes in it; parts first, so that a fault is found in its part."""
        given = {key: self.values[key.name] for key in keys().values() if key.of_config and key.name in self.values}
        given = {key: value for key, value in given.items() if not (key.name == "name" and value is None)}
        config = LizardConfig.preset(self.values.get("preset", keys()["preset"].default))
        if self.values.get("budget.state_mib") is not None and "budget.kept_keys" not in self.values:
            config = config.replace(attention={"kept_keys": 0})  # the preset's give way to the budget
        for part in ("attention", "stage0", "stage1", "stage2", "stage3", ""):
            here = {key: value for key, value in given.items() if ".".join(key.target[1:-1]) == part}
            changes = {key.target[-1]: value for key, value in here.items()}
            for one, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
                if changes.get(one) is not None and other not in changes:
                    changes[other] = None  # the preset's
            try:
                config = config.replace(**({part: changes} if part else changes))
            except ValueError as error:
                name = _meant(str(error), here) or part
                self._fault(name, str(error).removeprefix(f"{name.rpartition('.')[2]} "))
        return config

    def _plan(self, config: LizardConfig) -> Plan | Any:
        values = {
            key.target[0]: self.values.get(key.name, key.default)
            for key in keys().values()
            if not key.of_config and key.name != "preset"
        }
        for name in ("data", "weights", "eval_data", "passkey_lengths"):
            values[name] = None if values[name] is None else list(values[name])
        values["data"] = preset_data(config) if values["data"] is None else values["data"]
        values["dtype"] = None if values["dtype"] is None else getattr(torch, values["dtype"])
        for name in ("out", "start"):
            values[name] = None if values[name] is None else Path(values[name])
        try:
            return Plan(config=config, resume="auto", **values)
        except ValueError as error:
            field, _, what = str(error).partition(": ")
            name = next((key.name for key in keys().values() if key.target == (field,)), "")
            self._fault(name, what if name else str(error))
            return None


def _meant(message: str, given: Iterable[Key]) -> str:
    """The key that an error of a configuration is about: the first that it names of those that the file gives."""
    found = {key.name: re.search(rf"\b{key.target[-1]}\b", message) for key in given}
    places = {name: match.start() for name, match in found.items() if match}
    return min(places, key=lambda name: places[name], default="")


def _numbers(value: Any) -> list[float]:
    """The numbers of a value, those in lists too."""
    if isinstance(value, tuple):
        return [number for part in value for number in _numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def _is_usual(number: float) -> bool:
    return abs(number) < MOST if isinstance(number, int) else math.isfinite(number)


def _unknown(name: str, prefix: str) -> str:
    """What to say of a key that there is not."""
    if name in NOT_THERE:
        return NOT_THERE[name]
    if name in keys():
        section, _, last = name.rpartition(".")
        return f"stands in its section, wanted {section}: {{{last}: ...}}"
    here = [key.name.removeprefix(prefix) for key in keys().values() if key.section == prefix.rstrip(".")]
    here += [] if prefix else [section for section in SECTIONS if section]
    last = name.removeprefix(prefix)
    elsewhere = [key.name for key in keys().values() if key.name.rpartition(".")[2] == last]
    if near := elsewhere or [prefix + each for each in difflib.get_close_matches(last, here, n=1)]:
        return f"unknown key, did you mean {' or '.join(near)}?"
    return f"unknown key, wanted one of {', '.join(here)}"
