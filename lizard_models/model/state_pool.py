"""States of many texts that come and go, each in a page of its own: batches of any of them in one forward.

Shapes: B rows, T new tokens, P pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lizard_layers import AnchorBlock, HybridAttention, PagedState, State, page_layout, state_of
from lizard_models.model.cache import LizardCache
from lizard_models.model.cache_layer import LizardCacheLayer
from lizard_models.model.graphs import SeenPositions
from lizard_models.model.layer_configs import kept_layers


class StatePool:
    """Pages for the states of ``pages`` texts of a model, of which each forward reads and writes those it names.

    One storage of bytes a layer (``memory``), so that a text takes ``page_bytes`` in all, at any length. Who has which
    page is the caller's business; a page that is given to another text needs no cleaning. On a GPU the decode kernel
    works on the pages themselves, and a step may be captured in a CUDA graph and replayed with other pages.

    device, dtype: of the model by default; dtype is that of keys and values. Raises ValueError for kept softmax layers,
    whose keys and values grow, and for fewer than one page.
    """

    def __init__(self, model: Any, pages: int, device: torch.device | str | None = None, dtype: Any = None) -> None:
        if kept := kept_layers(model.config):
            raise ValueError(
                f"model: layers {list(kept)} are kept softmax, whose keys and values have no page: use vLLM"
            )
        if pages < 1:
            raise ValueError(f"pages: got {pages}, wanted at least 1")
        self.model = model
        device, dtype = device or model.device, dtype or model.dtype
        self.memory: list[Tensor] = []
        self.states: list[State] = []
        for i in range(model.config.num_hidden_layers):
            layout = page_layout(model.model.layers[i].self_attn.lizard.config, dtype)
            self.memory.append(layout.pages(pages, device))
            self.states.append(state_of(layout.views(self.memory[-1])))
        self.page_bytes = sum(memory.shape[1] for memory in self.memory)

    @torch.no_grad()
    def read(
        self, input_ids: Tensor, pages: Tensor, has_state: Tensor | None = None, furthest: int | None = None
    ) -> Tensor:
        """The logits [B, vocabulary] after the new tokens [B, T] of B texts, whose states go on in their pages.

        input_ids: [B, T], all of them real. pages: [B] int32 or int64 on the model's device, -1 for rows that are
        nobody's, whose logits say nothing.
        has_state: [B] bool, False for a text that begins; None: all go on. furthest: the most tokens that a text will
        have seen, which anchors that move on want to know; None asks the device where they do.
        """
        length = input_ids.shape[1]
        states = [PagedState(pool, pages, has_state) for pool in self.states]
        positions = next_positions(states[0])[:, None] + torch.arange(length, device=pages.device)
        past = 0
        if self.model.model.moves_anchors:
            past = (int(positions.max()) + 1 if furthest is None else furthest) - length
        cache = _PoolCache(self.model.config, states, past)
        outputs = self.model(input_ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1]


def next_positions(state: PagedState) -> Tensor:
    """[B] of the tokens to come."""
    there = state.indices >= 0
    if state.has_state is not None:
        there = there & state.has_state
    return torch.where(there, state.pool.position.index_select(0, state.indices.clamp(min=0)), 0)


class _PoolCache(LizardCache):
    """A cache of one forward, whose layers are pools."""

    def __init__(self, config: Any, states: list[PagedState], past: int) -> None:
        super().__init__(config)
        self.seen.on_host = past
        self.layers = [_PoolLayer(self.seen, state) for state in states]


class _PoolLayer(LizardCacheLayer):
    """The pages of a layer."""

    def __init__(self, seen: SeenPositions, paged: PagedState) -> None:
        super().__init__(seen)
        self.paged = paged

    def read(
        self,
        attention: HybridAttention,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        padding_mask: Tensor | None,
        anchor_blocks: list[AnchorBlock] | None = None,
    ) -> Tensor:
        assert padding_mask is None  # ``StatePool.read`` has none: a row that is nobody's has page -1
        return attention(x, q, k, v, rope, self.paged, True, None, None, anchor_blocks)[0]
