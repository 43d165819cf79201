"""How each training stage is run: the recipes of stages 0 to 3."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lizard_layers.field_types import check_fields

MOST = 1 << 48  # no count of anything reaches it, and what is computed of it still fits into 64 bits


def check_finite(instance: Any, prefix: str = "") -> None:
    """Raises ValueError for a number of a dataclass that is NaN, infinite, or an integer from 2**48 on.

    prefix: in front of the field's name. Tuples are looked through, dataclasses within are not.
    """
    for field in fields(instance):
        value = getattr(instance, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not _is_finite(number):
                raise ValueError(f"{prefix}{field.name} must be finite, got {value!r}")
            if isinstance(number, int) and abs(number) >= MOST:
                raise ValueError(f"{prefix}{field.name} must be below 2**48, got {value!r}")


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer larger than every float
        return False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the training stages have in common. The defaults are the paper's (arXiv 2507.09025, its Table 13)."""

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
        check_finite(self)
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(f"give one of epochs and max_steps, got epochs={self.epochs}, max_steps={self.max_steps}")
        for name in ("epochs", "max_steps", "examples", "sequence_length", "batch_size", "learning_rate", "eps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must be from 0 to below 2**32, got {self.seed}")
        for name in ("weight_decay", "warmup_ratio", "min_learning_rate_ratio", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.warmup_ratio > 1:
            raise ValueError(f"warmup_ratio is a share of the steps, from 0 to 1, got {self.warmup_ratio}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be from 0 to below 1, got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class Stage0Config(Recipe):
    """Scores of keys: what the teacher's later queries lose without each key, foretold when it leaves the window."""

    examples: int | None = None
    """Examples taken from the data set; None takes all, or as many as the rows need where the data are streamed."""

    epochs: float | None = None
    """Rows, as passes over the text."""

    max_steps: int | None = 240
    """Optimizer steps. Text with fewer rows than they take gives its rows again, with other things asked for."""

    sequence_length: int = 4096
    """Tokens of a row. A label sees no use of a key beyond its row: rows of 1024 teach nothing about later use."""

    batch_size: int = 2
    """Rows of an optimizer step."""

    learning_rate: float = 2e-3
    """Peak rate."""

    label: Literal["output", "attention"] = "output"
    """What is foretold: the relative error of the layer's output without the key, over all later queries, or the
    largest attention that one of them pays to it. Both as logarithms (``distill.key_labels``)."""

    label_queries: int = 512
    """Later queries that a key needs to be learned from: what few queries do not need, others may."""

    label_block: int = 1024
    """Queries whose attention matrices exist at a time while labels are made."""

    share_places: bool = False
    """Where ``kept_keys`` is one number: its bytes go to the layers and heads where places save most, by errors after
    o_proj that are measured once the scores are fitted. Without a stage 0 every key head has that number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_queries", "label_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Stage1Config(Recipe):
    """Attention approximation: teacher frozen, the new parameters learn its attention outputs."""

    gate_learning_rate: float | None = None
    """Peak rate of the weights that read the layer's input (gate and token bias of the merge); None is the common
    rate. At 1e-2 such weights saturate the gate (above 0.999) in most layers."""

    error: Literal["relative", "mse"] = "mse"
    """Error of a layer: squared error over squared target per head, averaged over heads; or the mean squared error (the
    paper's squared Frobenius norm divided by its number of entries), most of which a few loud layers give."""

    target: Literal["heads", "output"] = "heads"
    """Compared before the output projection (LoLCATs) or after it. The paper's equation does not say."""

    inputs: Literal["teacher", "student"] = "teacher"
    """What each layer reads: the teacher's own stream (teacher-forced, as LoLCATs), or the stream that earlier student
    layers leave, target computed on the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_learning_rate is not None and self.gate_learning_rate <= 0:
            raise ValueError(f"gate_learning_rate must be positive or None, got {self.gate_learning_rate}")


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
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}")
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}")
        if min(self.cross_entropy_weight, self.kl_weight) < 0 or self.cross_entropy_weight + self.kl_weight == 0:
            raise ValueError(
                "cross_entropy_weight and kl_weight must not be negative nor both zero, "
                f"got {self.cross_entropy_weight} and {self.kl_weight}"
            )


@dataclass(frozen=True, kw_only=True)
class Stage3Config(Recipe):
    """Stage 2 gone on with on longer rows: adapters, what trains and the loss are those of stage 2."""

    examples: int | None = None
    """Examples taken from the data set; None takes all."""

    epochs: float | None = None
    """Passes over the examples."""

    max_steps: int | None = 50
    """Optimizer steps, when given instead of ``epochs``."""

    sequence_length: int = 8192
    """Tokens of a packed training sequence."""

    batch_size: int = 1
    """Sequences of an optimizer step, over all devices and accumulation steps."""

    learning_rate: float = 2e-4
    """Peak rate."""

    new_learning_rate: float | None = None
    """Peak rate of the new parameters; None is the adapters'."""

    gate_learning_rate: float | None = None
    """Peak rate of the weights that read the layer's input (gate and token bias of the merge); None is that of the
    other new parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("new_learning_rate", "gate_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive or None, got {getattr(self, name)}")

    def after(self, stage2: Stage2Config) -> Stage2Config:
        """The whole recipe of the stage: ``stage2`` with the fields that are here."""
        return replace(stage2, **{field.name: getattr(self, field.name) for field in fields(self)})
