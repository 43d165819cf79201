"""What a Lizard model is and how it is trained, in one object that survives JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from lizard_layers import AttentionChoices
from lizard_layers.config import check_fields

CONFIG_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What both training stages have in common. The defaults are the paper's (arXiv 2507.09025, its Table 13)."""

    dataset: str = "yahma/alpaca-cleaned"
    """Training text: a data set of the hub, or a file or folder."""

    examples: int | None = 50_000
    """Examples taken from the data set; None takes all."""

    epochs: float | None = 2.0
    """Passes over the examples. Two passes over the paper's are about 20 million tokens."""

    max_steps: int | None = None
    """Optimizer steps, when given instead of ``epochs``."""

    sequence_length: int = 2048
    """Tokens of a packed training sequence."""

    batch_size: int = 8
    """Sequences of an optimizer step, over all devices and accumulation steps."""

    learning_rate: float = 1e-3
    """Peak rate."""

    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averages."""

    eps: float = 1e-8
    """AdamW's epsilon."""

    weight_decay: float = 0.0
    """AdamW's decay. The paper gives none."""

    warmup_ratio: float = 0.1
    """Share of the steps in which the rate rises linearly; then it falls as a cosine."""

    min_learning_rate_ratio: float = 0.1
    """Rate at the end, as a share of the peak."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the teacher's weights and of activations. New parameters are float32 in either."""

    seed: int = 0
    """Seed of shuffling and of random starts."""

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(f"give one of epochs and max_steps, got epochs={self.epochs}, max_steps={self.max_steps}")
        for name in ("epochs", "max_steps", "examples", "sequence_length", "batch_size", "learning_rate", "eps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_ratio", "min_learning_rate_ratio", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Stage1Config(Recipe):
    """Attention approximation: teacher frozen, the new parameters learn its attention outputs."""

    gate_learning_rate: float | None = None
    """Peak rate of the weights that read the layer's input (gate and token bias of the merge); None is the common
    rate. At 1e-2 such weights saturate the gate (above 0.999) in most layers."""

    error: Literal["relative", "mse"] = "mse"
    """Error of a layer: squared error over squared target, a head, averaged over heads; or the mean squared error (the
    paper's squared Frobenius norm divided by its number of entries), most of which a few loud layers give."""

    target: Literal["heads", "output"] = "heads"
    """Compared before the output projection (LoLCATs) or after it. The paper's equation does not say."""

    inputs: Literal["teacher", "student"] = "teacher"
    """What each layer reads: the teacher's own stream (teacher-forced, as LoLCATs), or the stream that earlier student
    layers leave, target computed on the same."""

    attention_weight: float = 0.0
    """Weight of a second error, added to the first: the KL divergence in nats from the teacher's attention weights to
    the student's, averaged over heads and layers (``lizard_layers.attention_divergence``; the paper compares outputs
    alone). The gradient of an output error hardly tells a map which of a thousand keys a head sought. It needs a form
    whose weights can be told: a merge of the keys outside the window, no delta memory, no gate a channel."""

    attention_rows: int = 128
    """Query rows of each sequence, evenly spaced, whose weights are compared: each takes a row of length T a head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_weight < 0:
            raise ValueError(f"attention_weight must not be negative, got {self.attention_weight}")
        if self.attention_rows < 1:
            raise ValueError(f"attention_rows must be at least 1, got {self.attention_rows}")


@dataclass(frozen=True, kw_only=True)
class Stage2Config(Recipe):
    """Fine-tuning of the whole student with LoRA, or of whole projections."""

    learning_rate: float = 5e-4
    """Peak rate."""

    new_learning_rate: float | None = None
    """Peak rate of the new parameters; None is the adapters'. Matrices that start from the identity move little at
    the rate of an adapter, whose start is small."""

    gate_learning_rate: float | None = None
    """Peak rate of the weights that read the layer's input (gate and token bias of the merge); None is that of the
    other new parameters."""

    trained: Literal["lora", "full"] = "lora"
    """How the projections of ``lora_targets`` learn. lora: through adapters. full: every number of their weights (the
    paper's Table 6 compares both), as a float32 change beside the teacher's weights, 16 bytes a number with gradient
    and moments; ``lora_rank``, ``lora_alpha`` and ``lora_dropout`` then mean nothing, and a tenth of the rate is
    usual."""

    lora_rank: int = 8
    """Rank of the adapters. The paper's Table 8 finds 8 best of 4 to 64."""

    lora_alpha: int = 16
    """Scale of the adapters: alpha / rank."""

    lora_dropout: float = 0.0
    """Dropout in front of the adapters."""

    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Projections with adapters. The paper leaves the output projection out; LoLCATs' Table 12 finds v and o matter
    more than q and k."""

    train_new_parameters: bool = True
    """Train maps, gates, sinks and mixes along, or the adapters alone. The paper does not say."""

    cross_entropy_weight: float = 1.0
    """Weight of the next-token cross-entropy."""

    kl_weight: float = 0.0
    """Weight of the KL divergence from the teacher's next-token distribution to the student's. The paper has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("new_learning_rate", "gate_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive or None, got {getattr(self, name)}")
        if self.trained == "full" and self.lora_dropout:
            raise ValueError(f'lora_dropout={self.lora_dropout} belongs to adapters, but trained="full" has none')
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if min(self.cross_entropy_weight, self.kl_weight) < 0 or self.cross_entropy_weight + self.kl_weight == 0:
            raise ValueError(
                "cross_entropy_weight and kl_weight must not be negative nor both zero, "
                f"got {self.cross_entropy_weight} and {self.kl_weight}"
            )


@dataclass(frozen=True, kw_only=True)
class LizardConfig:
    """Attention choices, layers kept softmax, and the recipe of both stages."""

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

    stage1: Stage1Config = field(default_factory=Stage1Config)
    """Recipe of stage 1, its target and inputs included (A12)."""

    stage2: Stage2Config = field(default_factory=Stage2Config)
    """Recipe of stage 2, what it trains included (A11)."""

    def __post_init__(self) -> None:
        check_fields(self)
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
        """A named configuration: paper, paper_literal, recommended, lolcats, liger or window_only.

        ``changes`` as in ``replace``: ``LizardConfig.preset("paper", attention={"window": 64})``.
        Raises ValueError for an unknown name.
        """
        from lizard_models.presets import PRESETS

        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, choose one of {', '.join(PRESETS)}")
        return PRESETS[name].replace(**changes)

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
        """The inverse of ``to_dict``. Raises ValueError for unknown keys, bad values and newer versions."""
        values = dict(values)
        version = values.pop("version", CONFIG_VERSION)
        if version != CONFIG_VERSION:
            raise ValueError(
                f"this Lizard config has version {version}, this lizard-attn reads version {CONFIG_VERSION}: "
                "update lizard-attn"
            )
        nested = {"attention": AttentionChoices, "stage1": Stage1Config, "stage2": Stage2Config}
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
    unknown = sorted(set(values) - known)
    if unknown:
        names = ", ".join(prefix + key for key in unknown)
        raise ValueError(f"unknown keys in Lizard config: {names}; known are {', '.join(sorted(known))}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
