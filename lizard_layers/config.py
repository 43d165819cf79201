"""Every choice of a hybrid attention layer, each with its readings, in one dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from lizard_layers.field_types import check_fields

LOOK_AHEAD = 2
"""The score of a key reads the layer's input up to this many tokens after it."""


def tuples(value: Any) -> Any:
    """Lists as tuples, those in them too."""
    return tuple(map(tuples, value)) if isinstance(value, (list, tuple)) else value


def numbers(kept_keys: Any) -> list[int]:
    """The numbers in ``kept_keys``, one or in lists."""
    return [n for part in kept_keys for n in numbers(part)] if isinstance(kept_keys, tuple) else [kept_keys]


@dataclass(frozen=True, kw_only=True)
class AttentionChoices:
    """What a layer computes, whatever its shape. The paper (arXiv 2507.09025) leaves many of these open.

    With features phi >= 0, log-decays g <= 0 and their running sum G, sink logits t_m, window w and n anchors::

        a_ij = phi_q(q_i) . phi_k(k_j) exp(G_i - G_j)         keys n <= j <= i, or n <= j <= i - w
        b_ij = exp(q_i . k_j / sqrt(D))                       keys i - w < j <= i and j < n
        o_lin_i = sum_j a_ij v_j / sum_j a_ij
        o_win_i = sum_j b_ij v_j / (sum_j b_ij + sum_m exp(t_m))

    and a mix of the two outputs. An unsound pair of choices raises ValueError with the reason.
    """

    window: int = 128
    """Keys of the window branch, the query's own included. The paper's best is 128 (its Table 7)."""

    anchors: int = 0
    """First positions kept exactly in the window branch and left out of the linear one. Teachers put much of their
    attention on the first tokens: 4 anchors cut the stage 1 error of a 135M teacher thirtyfold. The paper has none."""

    kept_keys: int | tuple[int, ...] | tuple[tuple[int, ...], ...] = 0
    """P: keys per key head that stay exact beyond window and anchors, the best so far by a learned score
    (``KeyScore``), in constant memory still. The others enter the linear branch when they leave the window or are
    displaced. A number for all key heads, one for each of them, or, of a model, a list of these for each of its layers:
    memory goes where it pays. The paper has none."""

    score_dim: int = 128
    """Width of the score's inner layer."""

    score_received: bool = False
    """Whether the score of a key also reads the attention that the key receives inside the window: how much in all, how
    much in its last quarter, and at most. The score is then known when the key leaves the window. What a key receives
    there foretells much of what it will be needed for: without it the error of stage 0 was a fifth higher."""

    score_stride: int = 8
    """Of the queries that see a key in the window every ``score_stride``-th counts, those at positions i with
    i % score_stride = score_stride - 1. Fewer cost less and say less."""

    window_rope: bool = True
    """RoPE in the window. The paper's equations have none: without it the window explains about 60% of the teacher at
    positions 0 to 127, with it all."""

    positions: Literal["true", "clamped"] = "true"
    """Distance at which a query sees the anchors. Keys of the window are less than ``window`` behind it at any length;
    anchors fall back without end. true: their distance i - j, which past the teacher's context is one it was never
    trained on. clamped: i - j as long as i < P = ``position_limit``; from there on the anchors follow in steps of
    s = ``position_step``: the distance is P - s + (i - P) mod s - j and never reaches P. With P = window + anchors and
    s = 1 these are StreamingLLM's positions in the cache (arXiv 2309.17453). Up to P both forms are the same; the
    distances that ``linear_rope`` brings into the linear branch grow without end in either."""

    kept_past: Literal["moved", "dropped"] = "moved"
    """Kept keys past ``position_limit``, with positions="clamped". moved: they follow as the anchors do, none further
    away than the newest anchor. dropped: a key that would have to follow leaves its place, which the next key that
    leaves the window takes, so that every distance is true and none reaches P; only the linear branch goes on
    remembering it, for which coverage must be "left" or "all". The exact reach is P - s to P tokens then, as the
    teacher's own."""

    position_limit: int | None = None
    """P: positions the teacher knows. None is its context (``max_position_embeddings``)."""

    position_step: int | None = None
    """s: how far the anchors move at a time. None is half of ``position_limit``. A prefill is cut where they move, so a
    step below a few hundred makes long prompts slow; decoding costs the same with any."""

    linear_rope: bool = False
    """RoPE before the feature maps. LoLCATs has it. It helps up to the training length and does not extrapolate."""

    num_sinks: int = 0
    """Meta memory: learned logits that take mass in the window's denominator and bring no value. The paper has 4. They
    are not the attention sinks of StreamingLLM, which are positions: ``anchors``."""

    sinks_per_head: bool = False
    """One set of sink logits per layer (False, the paper's shapes) or per query head (True)."""

    sink_form: Literal["exp", "linear"] = "exp"
    """Sink mass: sum of exp(t), or sum of t as printed in the paper. The printed form can reach zero or less (four
    sinks at -1 and one key of score 0 give -3), so only exp is safe; triton kernels take only exp."""

    sink_init: float = 0.0
    """Mean of the sinks' starting values."""

    sink_spread: float = 1.0
    """Distance between the starting values of neighbouring sinks. Equal sinks get equal gradients and act as one sink
    with logit t + ln m for ever, so zero with several sinks is refused."""

    linear_branch: bool = True
    """False leaves the window, its anchors and its sinks: the control beside every result."""

    coverage: Literal["all", "outside", "left"] = "outside"
    """Keys of the linear branch: all of them as printed in the paper, or those outside window and anchors (LoLCATs).
    With all, a key in the window counts twice. Outside and merged, prompts up to the window equal the teacher. A kept
    key is outside once it has expired; with left, which is outside but for that, once it has left the window: it counts
    twice while it is kept, and a place needs no inputs of the linear branch."""

    normalize: bool = True
    """Divide the linear branch by its mass, as the paper's parallel form does. Its recurrent form and its section 4
    do not; then the branch grows with the number of keys it remembers."""

    feature_activation: Literal["softmax", "exp", "one_sided_softmax"] = "softmax"
    """phi of a projected vector x: [softmax(x), softmax(-x)] (the paper's Table 13), [exp(x), exp(-x)] (its section 4;
    the same map without a bound), or softmax(x) (Liger)."""

    feature_projection: Literal["per_head", "shared", "none"] = "per_head"
    """Learned x W: one W per head (LoLCATs, which the paper's appendix B points to), one for all heads (the paper's
    equations), or none (Liger)."""

    tie_features: bool = False
    """One map for queries and keys (True) or one each."""

    key_map: Literal["key_head", "query_head"] = "key_head"
    """With grouped queries: a key map per key head, or per query head (LoLCATs). The second repeats keys and values and
    carries a state Hq/Hk times as large."""

    feature_dim: int | None = None
    """Width of the feature map; None is the head dim, counted as the projection."""

    feature_dim_counts: Literal["projection", "features"] = "projection"
    """What ``feature_dim`` counts: columns of W, or features after the two signs are joined. The paper's 128 does not
    say; the state is twice as large under the first reading."""

    feature_scale: float | None = None
    """Factor on the linear weights. None is 1 with ``normalize`` (where only a merge notices), F**-0.5 without."""

    gate: Literal["none", "scalar", "key_head", "channel", "mamba2", "pooling"] = "key_head"
    """Decay: none; sigmoid(w.x), shared by all heads (the paper's default; one shared gate hurts most heads) or one per
    key head; low-rank and per feature as in GLA (d x r, r x F); exp(-exp(A) softplus(w.x)) per key head as in Mamba-2;
    or sigmoid of the mean over each key head's channels, without parameters, after Liger."""

    gate_init: float | None = 0.993
    """Decay at the start, where the input says nothing. The paper gives none; None is a zero bias, sigmoid(0) = 0.5,
    which forgets within ten tokens."""

    gate_rank: int = 16
    """Rank r of the channel gate (the paper's Table 4: 16)."""

    gate_temperature: float = 1.0
    """The decay is sigmoid(.)**(1/temperature). GLA and Liger use 16."""

    gate_form: Literal["stable", "absorbed"] = "stable"
    """How chunks apply the gate: as a decay of the scores, or moved into the exponents of the features (the paper's
    section 4), which overflows for long or strong gates and is lost in a softmax."""

    mix: Literal["sum", "merge"] = "merge"
    """o_lin + alpha o_win (the paper), or the two weighted by their masses under one denominator (LoLCATs)."""

    alpha: Literal["fixed", "learned", "per_head"] = "fixed"
    """Whether alpha of the sum is a constant, one learned number, or one per query head."""

    alpha_init: float = 1.0
    """Alpha, or its start. In a mean of both branches the window's share is alpha / (1 + alpha); 0 switches it off."""

    merge_bias: Literal["none", "head", "head_and_token"] = "none"
    """Learned addition to the log-odds of the linear branch: a number per query head, alone or with a linear function
    of the layer's input."""

    merge_bias_init: float = 0.0
    """Start of the head's bias. LoLCATs' window factor of 0.1 is log 10 = 2.303 here."""

    impl: Literal["auto", "triton", "torch", "naive"] = "auto"
    """Implementation the ops use."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept_keys", tuples(self.kept_keys))
        check_fields(self)
        for name in ("window", "gate_rank", "score_dim", "score_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("anchors", "num_sinks", "sink_spread"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if min(numbers(self.kept_keys), default=-1) < 0:
            raise ValueError(f"kept_keys must not be negative or empty, got {self.kept_keys}")
        for name in ("position_limit", "position_step"):
            if getattr(self, name) is not None and self.positions == "true":
                raise ValueError(f'{name} belongs to positions="clamped", got {name}={getattr(self, name)} with "true"')
        if self.positions == "clamped":
            self._check_positions()
        if self.gate_init is not None and not 0 < self.gate_init < 1:
            raise ValueError(f"gate_init is a decay between 0 and 1, got {self.gate_init}")
        if self.gate_temperature <= 0:
            raise ValueError(f"gate_temperature must be positive, got {self.gate_temperature}")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1 or None, got {self.feature_dim}")
        if self.num_sinks > 1 and self.sink_spread == 0:
            raise ValueError(
                f"sink_spread=0 starts all {self.num_sinks} sinks equal: they get equal gradients and act as one"
            )
        if self.keeps_keys:
            self._check_kept_keys()
        if self.linear_branch:
            self._check_linear_branch()

    def _check_positions(self) -> None:
        limit, step = self.position_limit, self.position_step
        if limit is not None and limit < self.window + self.anchors:
            raise ValueError(
                f"position_limit={limit} is less than window + anchors = {self.window + self.anchors}: the anchors "
                "would move while the window still holds them"
            )
        if step is not None and not 1 <= step <= (limit or step):
            raise ValueError(f"position_step={step} must be at least 1 and at most position_limit={limit}")

    def _check_kept_keys(self) -> None:
        kept = f"kept_keys={self.kept_keys}"
        if not self.linear_branch:
            raise ValueError(f"{kept} leaves the other keys to the linear branch: linear_branch=False has none")
        if self.gate_form == "absorbed":
            raise ValueError(f'{kept} needs gate_form="stable": a key enters the sums long after it came')
        if self.kept_past == "dropped" and self.positions == "true":
            raise ValueError(f'{kept} with kept_past="dropped" needs positions="clamped", got "true"')
        if self.kept_past == "dropped" and self.coverage == "outside":
            raise ValueError(
                f'{kept} with kept_past="dropped" needs coverage="left" or "all": with "outside" the sums would never '
                "have a dropped key"
            )
        if self.window <= LOOK_AHEAD:
            raise ValueError(
                f"{kept} needs a window of at least {LOOK_AHEAD + 1}, got {self.window}: the score of a key reads "
                f"{LOOK_AHEAD} tokens after it"
            )

    def _check_linear_branch(self) -> None:
        if self.feature_dim is not None and self.two_sided and self.feature_dim_counts == "features":
            if self.feature_dim % 2:
                raise ValueError(f"feature_dim={self.feature_dim} counts both signs and must be even")
        if self.feature_projection == "none" and self.feature_dim is not None:
            raise ValueError('feature_dim needs a learned projection, but feature_projection="none"')
        if self.mix == "merge":
            if not self.normalize:
                raise ValueError('mix="merge" weighs two means by their masses: it needs normalize=True')
            if self.sink_form == "linear" and self.num_sinks:
                raise ValueError(
                    'mix="merge" takes the log of the window\'s mass, which sink_form="linear" lets reach zero'
                )
            if self.alpha != "fixed" or self.alpha_init != 1.0:
                raise ValueError('alpha belongs to mix="sum"; with mix="merge" use merge_bias')
        elif self.merge_bias != "none" or self.merge_bias_init:
            raise ValueError('merge_bias belongs to mix="merge"; with mix="sum" use alpha')
        if self.merge_bias_init and self.merge_bias == "none":
            raise ValueError(f'merge_bias_init={self.merge_bias_init} starts a bias, but merge_bias="none" has none')
        if self.gate_form == "absorbed":
            if self.feature_activation == "softmax":
                raise ValueError(
                    'gate_form="absorbed" adds the gate inside the activation, and a softmax divides it out again: '
                    'use gate_form="stable", or feature_activation="exp"'
                )
            if self.gate == "channel":
                raise ValueError('gate_form="absorbed" takes one gate per head, but gate="channel" has one per feature')

    @property
    def keeps_keys(self) -> bool:
        """Whether any key head keeps keys."""
        return any(numbers(self.kept_keys))

    @property
    def by_layer(self) -> bool:
        """Whether ``kept_keys`` has a list for each layer of a model."""
        return isinstance(self.kept_keys, tuple) and any(isinstance(part, tuple) for part in self.kept_keys)

    @property
    def two_sided(self) -> bool:
        """Whether the activation joins phi(x) and phi(-x)."""
        return self.feature_activation in ("softmax", "exp")

    @property
    def score_delay(self) -> int:
        """How many tokens after its key a score is known."""
        return self.window - 1 if self.score_received else LOOK_AHEAD


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(AttentionChoices):
    """The choices of a layer together with its shape."""

    hidden_size: int
    """Width of the layer's input x."""

    num_heads: int
    """Query heads Hq."""

    num_key_heads: int
    """Key and value heads Hk, a divisor of Hq."""

    head_dim: int
    """Channels of a head D, the same for keys and values."""

    scale: float | None = None
    """Factor of the window's scores q . k; None is head_dim**-0.5."""

    softcap: float | None = None
    """Bound c of the window's scores, c tanh(score / c), as Gemma 2 has it; None leaves them. Triton kernels do not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden_size", "num_heads", "num_key_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive or None, got {getattr(self, name)}")
        if self.num_heads % self.num_key_heads:
            raise ValueError(f"num_key_heads={self.num_key_heads} must divide num_heads={self.num_heads}")
        object.__setattr__(self, "kept_keys", self._kept_by_head())
        if (self.window_rope or self.linear_rope) and self.head_dim % 2:
            raise ValueError(f"RoPE turns pairs of channels: head_dim must be even, got {self.head_dim}")

    def _kept_by_head(self) -> int | tuple[int, ...]:
        """``kept_keys`` as a number if every key head has as many."""
        kept: Any = self.kept_keys
        if not isinstance(kept, tuple):
            return kept
        if self.by_layer or len(kept) != self.num_key_heads:
            wanted = f"a number or one for each of its {self.num_key_heads} key heads"
            raise ValueError(f"kept_keys of a layer must be {wanted}, got {kept}")
        return kept[0] if len(set(kept)) == 1 else kept

    @property
    def places(self) -> int | tuple[int, ...]:
        """``kept_keys`` of the key heads of the linear branch, which are query heads with ``key_map="query_head"``."""
        kept: Any = self.kept_keys
        group = self.linear_key_heads // self.num_key_heads
        return tuple(n for n in kept for _ in range(group)) if isinstance(kept, tuple) else kept

    @property
    def kept_by_head(self) -> tuple[int, ...]:
        """``kept_keys`` of each key head."""
        kept: Any = self.kept_keys
        return kept if isinstance(kept, tuple) else (kept,) * self.num_key_heads

    @classmethod
    def from_choices(
        cls,
        choices: AttentionChoices,
        *,
        hidden_size: int,
        num_heads: int,
        num_key_heads: int,
        head_dim: int,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> AttentionConfig:
        """The same choices with a shape."""
        values: dict[str, Any] = {f.name: getattr(choices, f.name) for f in dataclasses.fields(AttentionChoices)}
        values |= dict(hidden_size=hidden_size, num_heads=num_heads, num_key_heads=num_key_heads, head_dim=head_dim)
        return cls(**values, scale=scale, softcap=softcap)

    @property
    def projection_dim(self) -> int:
        """Channels Fp that enter the activation."""
        if self.feature_dim is None:
            return self.head_dim
        halves = self.two_sided and self.feature_dim_counts == "features"
        return self.feature_dim // 2 if halves else self.feature_dim

    @property
    def num_features(self) -> int:
        """Features F that leave the activation."""
        return 2 * self.projection_dim if self.two_sided else self.projection_dim

    @property
    def linear_key_heads(self) -> int:
        """Key heads of the linear branch and its state: Hk, or Hq when every query head has a key map of its own."""
        return self.num_heads if self.linear_branch and self.key_map == "query_head" else self.num_key_heads
