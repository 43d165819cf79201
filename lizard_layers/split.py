"""A layer whose heads are split over ranks: each computes its own, from the whole of the layer's input."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lizard_layers.config import AttentionConfig
from lizard_layers.hybrid_attention import HybridAttention


def config_of_rank(config: AttentionConfig, rank: int, size: int) -> AttentionConfig:
    """The layer of the heads of one of ``size`` ranks: key heads in order, with the query heads that read them.

    Nothing in the layer goes from head to head, so that outputs and states are those of the whole layer, cut.
    Raises ValueError for key heads that do not divide, and for places of kept keys of which a rank would have none.
    """
    if config.num_key_heads % size:
        raise ValueError(
            f"num_key_heads={config.num_key_heads}: heads are split over {size} ranks, wanted a number that divides it"
        )
    each, kept = config.num_key_heads // size, config.kept_keys
    if isinstance(kept, tuple):
        kept = kept[rank * each : (rank + 1) * each]
        if not any(kept):  # such a rank would have no scores, and the others' weights
            raise ValueError(f"kept_keys={config.kept_keys}: of {size} ranks, rank {rank} would have no place")
    return dataclasses.replace(config, num_heads=config.num_heads // size, num_key_heads=each, kept_keys=kept)


def sizes_of_rank(config: AttentionConfig, rank: int, size: int) -> dict[str, torch.Size]:
    """Shapes of the parameters of ``config_of_rank``'s layer, by name. Where one differs from the whole layer's, it is
    in the first axis, whose entries are those of heads in order."""
    with torch.device("meta"):
        layer = HybridAttention(config_of_rank(config, rank, size))
    return {name: p.shape for name, p in layer.named_parameters()}


def part_of_rank(whole: Tensor, shape: torch.Size, rank: int) -> Tensor:
    """The part of a whole layer's parameter that a rank has, of a shape from ``sizes_of_rank``."""
    return whole if whole.shape == shape else whole.narrow(0, rank * shape[0], shape[0])
