"""The state a layer carries: its shape before any token, and the moves a batch makes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lizard_layers.config import AttentionConfig
from lizard_layers.key_score import ReceivingState, ScoreState, empty_score_state
from lizard_ops import EMPTY_VALUES, AttentionState, PageLayout

OF_KEYS = ("ring_k", "ring_v", "ring_fk", "anchor_k", "anchor_v", "kept_k", "kept_v", "kept_fk")
"""Tensors of a state in the dtype of keys and values."""

OF_SCORES = ("kept_scores", "ring_scores", "score.key_sum")
"""Tensors of a state that keep their dtype, whatever that of keys and values."""


class LayerState(NamedTuple):
    """The state of a layer that keeps keys by their scores: what its op and what its score carry."""

    attention: AttentionState
    score: ScoreState | ReceivingState

    @property
    def position(self) -> Tensor:
        """[N] int64, tokens seen."""
        return self.attention.position


State = AttentionState | LayerState


def empty_state(
    config: AttentionConfig,
    num_sequences: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> State:
    """The state of ``num_sequences`` sequences before their first token, every tensor at its final size.

    dtype is that of keys and values; sums and gates are float32, or float64 with float64 keys, and so are the scores'
    parts but for the sums of keys, which are float64. An ``AttentionState``, in a ``LayerState`` with ``kept_keys``.
    """
    n, work = num_sequences, torch.float64 if dtype == torch.float64 else torch.float32
    key_heads, dim, kept = config.linear_key_heads, config.head_dim, config.places
    places = (sum(kept),) if isinstance(kept, tuple) else (kept, key_heads)  # one list where heads differ

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.zeros(n, *shape, dtype=of, device=device)

    fields: dict[str, Tensor] = {"position": zeros(of=torch.int64)}
    for name in ("ring_k", "ring_v"):
        fields[name] = zeros(config.window, key_heads, dim)
    for name in ("anchor_k", "anchor_v") if config.anchors else ():
        fields[name] = zeros(config.anchors, key_heads, dim)
    if config.linear_branch:
        features, outside, late = config.num_features, config.coverage != "all", config.coverage == "outside"
        fields["s"] = zeros(key_heads, features, dim, of=work)
        fields["z"] = zeros(key_heads, features, of=work)
        if config.feature_activation == "exp" or (config.kept_keys and outside):
            fields["log_scale"] = zeros(key_heads, of=work)
        if outside:
            fields["ring_fk"] = zeros(config.window, key_heads, config.projection_dim)
            if config.kept_keys and late:
                fields["kept_fk"] = zeros(*places, config.projection_dim)
        if outside and config.gate != "none":
            each = (key_heads, features) if config.gate == "channel" else (key_heads,)
            fields["ring_g"] = zeros(config.window, *((1,) if config.gate == "scalar" else each), of=work)
            if config.kept_keys and late:
                fields["kept_g"] = zeros(*places, *each[1:], of=work)
    if config.kept_keys:
        fields |= {name: zeros(*places, dim) for name in ("kept_k", "kept_v")}
        fields |= {"kept_scores": zeros(*places, of=torch.float32), "kept_positions": zeros(*places, of=torch.int64)}
        fields["ring_scores"] = zeros(config.window - config.score_delay, key_heads, of=torch.float32)
    for name, value in EMPTY_VALUES.items():
        if name in fields:
            fields[name].fill_(value)
    if not config.kept_keys:
        return AttentionState(**fields)
    window = config.window if config.score_received else None
    score = empty_score_state(num_sequences, config.score_dim, config.num_key_heads, dim, work, device, window)
    return LayerState(AttentionState(**fields), score)


def page_layout(config: AttentionConfig, dtype: torch.dtype) -> PageLayout:
    """Where the tensors of a layer's state lie in a page of a pool, by the names of ``tensors_of``.

    dtype: of keys and values. ``state_of(layout.views(pages))`` is the pool.
    """
    return PageLayout(tensors_of(empty_state(config, 1, dtype, "cpu")))


def tensors_of(state: State) -> dict[str, Tensor]:
    """Every tensor of a state by its name; those of a score begin with "score."."""
    if isinstance(state, AttentionState):
        return {name: t for name, t in state._asdict().items() if t is not None}
    return tensors_of(state.attention) | {f"score.{name}": t for name, t in state.score._asdict().items()}


def state_of(tensors: dict[str, Tensor]) -> State:
    """The inverse of ``tensors_of``. Raises TypeError for names that no state has, or a score that lacks some."""
    score = {name.removeprefix("score."): t for name, t in tensors.items() if name.startswith("score.")}
    attention = AttentionState(**{name: t for name, t in tensors.items() if not name.startswith("score.")})
    if not score:
        return attention
    return LayerState(attention, ReceivingState(**score) if "ring" in score else ScoreState(**score))


def map_state(state: State, fn: Callable[[Tensor], Tensor]) -> State:
    """The state with ``fn`` applied to every tensor it holds, e.g. ``lambda t: t.to(device)`` or ``Tensor.detach``."""
    return state_of({name: fn(t) for name, t in tensors_of(state).items()})


def moved_state(state: State, device: torch.device | str | None, dtype: torch.dtype | None) -> State:
    """The state elsewhere; dtype is that of keys and values, sums and gates stay float32 (float64 with it)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32

    def kind(name: str, t: Tensor) -> torch.dtype:
        if dtype is None or not t.is_floating_point() or name in OF_SCORES:
            return t.dtype
        return dtype if name in OF_KEYS else work

    return state_of({name: t.to(device=device, dtype=kind(name, t)) for name, t in tensors_of(state).items()})


def overwrite_layer_state(state: State, new: State) -> State:
    """``state`` with the values of ``new``, which holds the same tensors, in the memory and dtypes it has."""
    values = tensors_of(new)
    copy_together((kept, values[name]) for name, kept in tensors_of(state).items())
    return state


def copy_together(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give the first tensor of each pair the values of the second."""
    kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for kept, value in pairs:
        if kept is not value:
            kinds.setdefault((kept.dtype, value.dtype), []).append((kept, value))
    for same in kinds.values():  # one launch for each pair of dtypes
        torch._foreach_copy_([kept for kept, _ in same], [value for _, value in same])


def clear_state(state: State) -> None:
    """Put the state back in front of its first token, where its tensors lie."""
    for name, t in tensors_of(state).items():
        t.fill_(EMPTY_VALUES.get(name, 0))


def select_sequences(state: State, indices: Tensor) -> State:
    """The states of the sequences ``indices`` [M] int64, in that order, repeats allowed: beam search, batch changes."""
    return map_state(state, lambda t: t.index_select(0, indices.to(t.device)))


def state_bytes(state: State) -> int:
    """Bytes of every tensor the state holds."""
    return sum(t.numel() * t.element_size() for t in tensors_of(state).values())
