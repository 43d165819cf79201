"""What a Lizard model is and how it is trained, in one object that survives JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from lizard_layers import AttentionChoices
from lizard_layers.field_types import check_fields
from lizard_models.presets import PRESETS
from lizard_models.recipes import Stage0Config, Stage1Config, Stage2Config, Stage3Config, check_finite

CONFIG_VERSION = 1

RETIRED: dict[str, Any] = {
    "attention.memory": "sum",
    "attention.beta_init": 0.1,
    "attention.key_conv": 0,
    "attention.feature_norm": False,
    "attention.feature_noise": 0.0,
    "attention.gate_spread": 1.0,
    "attention.merge_mass": "relative",
    "stage1.attention_weight": 0.0,
    "stage1.attention_rows": 128,
}
"""Fields of earlier configs, and the default of each, at which it changed nothing: with it a config loads, with another
value it is refused, for nothing here computes what it asks for. docs/diary.md says what each was."""

RETIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.feature_activation": ("identity",),
    "attention.gate": ("query_head",),
    "attention.merge_bias": ("token",),
}
"""Values that fields no longer take, refused as well."""

LAST_WITH_RETIRED = "lizard-attn 0.1.0 (commit a286720)"


@dataclass(frozen=True, kw_only=True)
class LizardConfig:
    """Attention choices, layers kept softmax, and the recipes of the stages."""

    name: str = "custom"
    """What reports call it: the preset it started from."""

    attention: AttentionChoices = field(default_factory=AttentionChoices)
    """What every converted layer computes (the paper's open choices A1 to A10 and A13)."""

    softmax_layers: tuple[int, ...] = ()
    """Indices of layers that keep the teacher's softmax attention and its growing cache."""

    wide_layers: tuple[int, ...] = ()
    """Indices of converted layers whose window has ``wide_window`` keys in place of ``attention.window``. Much of what
    a teacher reads far back it reads in few layers; there a wide window holds it exactly, in memory that is constant
    still."""

    wide_window: int = 1024
    """Keys of the window branch in ``wide_layers``."""

    wide_gate_stretch: float = 1.0
    """What the log-decays of ``wide_layers`` are divided by. A key reaches their linear branch only when it leaves the
    wide window, and has decayed since it was read: 0.985**1024 is 2e-7. Divided by wide_window / attention.window it
    has decayed as much as one that leaves the other layers' window."""

    softmax_share: float = 0.0
    """Share of the layers kept softmax, placed evenly, instead of a list: the rounded number of the layers that are not
    kept as sliding ones, at least one unless the share is 0."""

    keep_sliding_layers: bool | None = None
    """Keep the teacher's sliding-window layers as they are; their cache has a constant size already. None keeps them
    where the teacher has layers of both kinds (Gemma, some Qwen2) and converts them where every layer slides
    (Mistral 0.1)."""

    stage0: Stage0Config = field(default_factory=Stage0Config)
    """Recipe of stage 0, which fits the scores of ``attention.kept_keys``; without kept keys there is no such stage."""

    stage1: Stage1Config = field(default_factory=Stage1Config)
    """Recipe of stage 1, its target and inputs included (A12)."""

    stage2: Stage2Config = field(default_factory=Stage2Config)
    """Recipe of stage 2, what it trains included (A11)."""

    stage3: Stage3Config = field(default_factory=Stage3Config)
    """Recipe of stage 3, which goes on with stage 2 on longer rows where a run is asked for it."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_finite(self)
        check_finite(self.attention, "attention.")
        for name in ("softmax_layers", "wide_layers"):
            layers = getattr(self, name)
            if len(set(layers)) < len(layers) or min(layers, default=0) < 0:
                raise ValueError(f"{name} must be distinct indices from 0, got {list(layers)}")
        if both := sorted(set(self.softmax_layers) & set(self.wide_layers)):
            raise ValueError(f"wide_layers: layers {both} are in softmax_layers, which have no window")
        if self.wide_layers and self.wide_window < self.attention.window:
            raise ValueError(
                f"wide_window={self.wide_window} must be at least attention.window={self.attention.window}"
            )
        if self.wide_gate_stretch <= 0:
            raise ValueError(f"wide_gate_stretch must be positive, got {self.wide_gate_stretch}")
        if self.wide_gate_stretch != 1 and self.attention.gate in ("none", "mamba2"):
            raise ValueError(
                f"wide_gate_stretch={self.wide_gate_stretch} needs a gate with a temperature, got "
                f"gate={self.attention.gate!r}; wanted 1 with it"
            )
        if not 0 <= self.softmax_share < 1:
            raise ValueError(f"softmax_share is a share of the layers, from 0 to below 1, got {self.softmax_share}")
        if self.softmax_share and self.softmax_layers:
            raise ValueError(
                "give one of softmax_layers and softmax_share, "
                f"got {list(self.softmax_layers)} and {self.softmax_share}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LizardConfig:
        """A named configuration: paper, paper_literal, plain, recommended, lolcats, liger or window_only.

        ``changes`` as in ``replace``: ``LizardConfig.preset("paper", attention={"window": 64})``.
        Raises ValueError for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, choose one of {', '.join(PRESETS)}")
        return cls.from_dict({"name": name, **PRESETS[name]}).replace(**changes)

    def replace(self, **changes: Any) -> LizardConfig:
        """A copy with fields replaced; a dict changes the fields it names and leaves the others."""
        merged = self.to_dict()
        for key, value in changes.items():
            nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = {**merged[key], **value} if nested else value
        return self.from_dict(merged)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, with the version of the format."""
        return {"version": CONFIG_VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LizardConfig:
        """The inverse of ``to_dict``. Fields of ``RETIRED`` at their defaults are left out.

        Raises ValueError for unknown keys, bad values, retired fields at other values, and newer versions.
        """
        values = dict(values)
        version = values.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise ValueError(
                f"this Lizard config has version {version}, this lizard-attn reads version {CONFIG_VERSION}: "
                "update lizard-attn"
            )
        nested = {
            "attention": AttentionChoices,
            "stage0": Stage0Config,
            "stage1": Stage1Config,
            "stage2": Stage2Config,
            "stage3": Stage3Config,
        }
        for key, kind in nested.items():
            if isinstance(values.get(key), dict):
                values[key] = _from_dict(kind, values[key], f"{key}.")
        return _from_dict(cls, values, "")

    def to_json(self) -> str:
        """``to_dict`` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> LizardConfig:
        """The inverse of ``to_json``."""
        return cls.from_dict(json.loads(text))


def _from_dict(kind: Any, values: dict[str, Any], prefix: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    values = _without_retired(values, prefix)
    unknown = sorted(set(values) - known)
    if unknown:
        names = ", ".join(prefix + key for key in unknown)
        raise ValueError(f"unknown keys in Lizard config: {names}; known are {', '.join(sorted(known))}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _without_retired(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The values without retired fields. Raises ValueError where one of them asks for what is gone."""
    kept = {}
    for key, value in values.items():
        name = prefix + key
        retired = name in RETIRED
        if (retired and value != RETIRED[name]) or value in RETIRED_VALUES.get(name, ()):
            wanted = f"{RETIRED[name]!r}, or no such field" if retired else "another value"
            raise ValueError(
                f"{name} is {value!r}, which was retired, wanted {wanted}; the last to read it is {LAST_WITH_RETIRED}"
            )
        if not retired:
            kept[key] = value
    return kept
