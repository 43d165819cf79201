"""The state a layer carries: its shape before any token, and the moves a batch makes with it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lizard_layers.config import AttentionConfig
from lizard_ops import AttentionState


def empty_state(
    config: AttentionConfig,
    num_sequences: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> AttentionState:
    """The state of ``num_sequences`` sequences before their first token, every tensor at its final size.

    dtype is that of keys and values; sums and gates are float32, or float64 with float64 keys.
    """
    n, work = num_sequences, torch.float64 if dtype == torch.float64 else torch.float32
    key_heads, dim = config.linear_key_heads, config.head_dim

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.zeros(n, *shape, dtype=of, device=device)

    fields: dict[str, Tensor] = {"position": zeros(of=torch.int64)}
    for name in ("ring_k", "ring_v"):
        fields[name] = zeros(config.window, key_heads, dim)
    for name in ("anchor_k", "anchor_v") if config.anchors else ():
        fields[name] = zeros(config.anchors, key_heads, dim)
    if config.linear_branch:
        features = config.num_features
        fields["s"] = zeros(key_heads, features, dim, of=work)
        fields["z"] = zeros(key_heads, features, of=work)
        if config.feature_activation == "exp":
            fields["log_scale"] = zeros(key_heads, of=work).fill_(-torch.inf)
        if config.coverage == "outside":
            fields["ring_fk"] = zeros(config.window, key_heads, config.projection_dim)
            if config.gate != "none":
                widths = {"scalar": (1,), "channel": (key_heads, features)}
                fields["ring_g"] = zeros(config.window, *widths.get(config.gate, (key_heads,)), of=work)
    return AttentionState(**fields)


def map_state(state: AttentionState, fn: Callable[[Tensor], Tensor]) -> AttentionState:
    """The state with ``fn`` applied to every tensor it holds, e.g. ``lambda t: t.to(device)`` or ``Tensor.detach``."""
    return AttentionState(**{name: fn(t) for name, t in state._asdict().items() if t is not None})


def select_sequences(state: AttentionState, indices: Tensor) -> AttentionState:
    """The states of the sequences ``indices`` [M] int64, in that order, repeats allowed: beam search, batch changes."""
    return map_state(state, lambda t: t.index_select(0, indices.to(t.device)))


def state_bytes(state: AttentionState) -> int:
    """Bytes of every tensor the state holds."""
    return sum(t.numel() * t.element_size() for t in state if t is not None)
