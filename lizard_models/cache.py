"""The cache of a Lizard model: constant size, behind transformers' Cache interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from lizard_layers import AttentionState, select_sequences, state_bytes
from lizard_models.layer_configs import converted_layers


class LizardCacheLayer(CacheLayerMixin):
    """The state of one converted layer. Its tensors have their final size from the first token on."""

    is_sliding = False  # the sliding window of a kept layer is another size, and masks are made for that one
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: AttentionState | None = None
        self.seen = 0

    def set_state(self, state: AttentionState, new_positions: int) -> None:
        """Take the state after ``new_positions`` more positions, padding included."""
        self.state = state
        self.seen += new_positions
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Positions seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under the name earlier releases of transformers call."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a mask would cover: the new positions, as the past is in the state."""
        return query_length, 0

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do before the first state."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("a Lizard layer keeps a state, not keys and values: it cannot be updated with them")

    def reset(self) -> None:
        """Forget every sequence."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "a constant-size state cannot be cropped: what earlier tokens left in it cannot be taken out. "
            "Keep a copy.deepcopy of the cache from before the tokens to drop"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        if self.state is not None:
            self.state = select_sequences(self.state, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times in place."""
        if self.state is not None:
            rows = torch.arange(self.state.position.shape[0], device=self.state.position.device)
            self.state = select_sequences(self.state, rows.repeat_interleave(repeats))

    def offload(self) -> None:
        raise ValueError("the cache of a Lizard model is small and stays on its device: offloading is not supported")

    prefetch = offload


class LizardCache(Cache):
    """One ``LizardCacheLayer`` a converted layer, the family's ordinary cache layer for each kept softmax.

    It grows only by what kept softmax layers store. Two caches are independent; ``copy.deepcopy`` takes a snapshot.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig) -> None:
        layers = list(DynamicCache(config=config).layers)
        for i in converted_layers(config):
            layers[i] = LizardCacheLayer()
        super().__init__(layers=layers)

    @property
    def is_linear(self) -> list[bool]:
        """True for converted layers, so that masks take their sizes from the kept softmax ones."""
        return [isinstance(layer, LizardCacheLayer) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, padding included."""
        return self.layers[layer_idx].get_seq_length()

    def positions(self) -> Tensor | None:
        """Position [B] int64 of each row's next token, padding not counted. None before the first state."""
        for layer in self.layers:
            if isinstance(layer, LizardCacheLayer) and layer.state is not None:
                return layer.state.position
        return None

    def state_bytes(self) -> int:
        """Bytes held, those of kept softmax layers included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, LizardCacheLayer):
                total += 0 if layer.state is None else state_bytes(layer.state)
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total
