"""The state of one converted layer, behind transformers' interface of a cache layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lizard_layers import (
    AnchorBlock,
    HybridAttention,
    State,
    clear_state,
    map_state,
    moved_state,
    overwrite_layer_state,
    select_sequences,
    tensors_of,
)
from lizard_models.model.graphs import SeenPositions, is_graphed, mark_static, outside_inference_mode
from lizard_models.model.rollback import LIMIT, Rollback


class LizardCacheLayer(CacheLayerMixin):
    """The state of one converted layer. Its tensors have their final size from the first token on.

    Where no gradients are recorded they also keep their addresses: steps, prefills and reorders of the same number of
    rows write into them.
    """

    is_sliding = False  # the sliding window of a kept layer is another size, and masks are made for that one
    is_croppable = True
    supports_early_init = False
    _writable: tuple[State | None, bool] = (None, False)  # state found so last; in inference mode?

    def __init__(self, seen: SeenPositions | None = None, static: bool = False) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = seen or SeenPositions()
        self.is_compileable = static
        self._rollback: Rollback | None = None
        self.recall = LIMIT  # tokens that can be taken back while the past is recorded
        self._blank = True  # no state but an empty one was set

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
        """The outputs of ``attention`` at new positions, whose state is then kept. Arguments as it takes them."""
        before = self._to_read()
        if self._rollback is None or x.shape[1] == 0:
            return self._read(attention, before, (x, q, k, v, *(rope or ()), padding_mask), anchor_blocks)
        inputs = (x, q, k, v, *(rope or ()), padding_mask)
        outputs, early = [], max(0, x.shape[1] - self.recall)
        blocks, late_blocks = split_blocks(anchor_blocks, early)
        if early:  # read in two pieces, of which only the second can be taken back
            piece = tuple(None if t is None else t[:, :early] for t in inputs)
            outputs.append(self._read(attention, before, piece, blocks))
            before, self._rollback = self.state, Rollback(self.state, self.recall)
        piece = tuple(None if t is None else t[:, early:] for t in inputs)
        self._rollback.record(attention, piece, late_blocks)
        outputs.append(self._read(attention, before, piece, late_blocks))
        return torch.cat(outputs, 1)

    def _read(
        self,
        attention: HybridAttention,
        state: State | None,
        inputs: tuple[Tensor | None, ...],
        anchor_blocks: list[AnchorBlock] | None,
    ) -> Tensor:
        x, q, k, v, *turns, padding_mask = inputs
        assert x is not None and q is not None and k is not None and v is not None
        rope: Any = tuple(turns) or None
        gradients = torch.is_grad_enabled() and (
            any(t.requires_grad for t in (x, q, k, v)) or any(p.requires_grad for p in attention.parameters())
        )
        inplace = x.shape[1] == 1 and state is not None and not gradients and is_writable(state)
        o, state = attention(x, q, k, v, rope, state, True, padding_mask, None, anchor_blocks, inplace)
        if not inplace:
            self._take(state, inputs)
        return o

    def _take(self, state: State, inputs: tuple[Tensor | None, ...]) -> None:
        """``set_state`` of what the layer has made of its inputs, without a copy where the memory is nobody else's."""
        if torch.compiler.is_compiling() or self.state is not None or torch.is_grad_enabled():
            self.set_state(state)
            return
        if torch.is_inference_mode_enabled() or not own_memory(state, inputs):
            self.set_state(state)
            return
        self.state, self._blank, self.is_initialized = state, False, True
        for t in tensors_of(state).values():
            mark_static(t)

    def _to_read(self) -> State | None:
        """The state, or None where it is known to be empty."""
        if not is_graphed(self.seen.on_device) and self._blank and self.seen.on_host == 0:
            return None
        return self.state

    def to_overwrite(self) -> State | None:
        """The state of the tokens before, where a step without gradients may overwrite it and nobody records it."""
        state = self._to_read() if self._rollback is None else None
        found = state, torch.is_inference_mode_enabled()
        if state is None or found[0] is not self._writable[0] or found[1] != self._writable[1]:
            if state is None or not is_writable(state):
                return None
            self._writable = found
        return state

    def set_state(self, state: State) -> None:
        """Keep this state: in the memory of the one before where it fits, in memory of its own elsewhere."""
        self._blank = False
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(state).values())
        if recorded:
            self.state = state
        elif self.state is not None and is_writable(self.state) and fits(self.state, state):
            overwrite_layer_state(self.state, state)
        else:
            with outside_inference_mode():
                self.state = map_state(state, lambda t: t.clone(memory_format=torch.contiguous_format))
            for t in tensors_of(self.state).values():
                mark_static(t)
        self.is_initialized = True

    def place_for(self, state: State) -> State:
        """Tensors of its own for the values of ``state``, which the caller writes: those it has where they fit."""
        if self.state is None or not is_writable(self.state) or not fits(self.state, state):
            with outside_inference_mode():
                self.state = map_state(state, lambda t: torch.empty_like(t, memory_format=torch.contiguous_format))
            for t in tensors_of(self.state).values():
                mark_static(t)
        self._blank, self.is_initialized = False, True
        return self.state

    @property
    def is_empty(self) -> bool:
        """Whether the next forward finds nothing to read."""
        return self._to_read() is None

    def get_seq_length(self) -> int:
        """Positions seen, padding included."""
        return self.seen.value()

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
        """Forget every sequence. The tensors stay where they are."""
        self._blank = True
        if self.state is not None and is_writable(self.state):
            clear_state(self.state)
        else:
            self.forget()
        if self._rollback is not None:
            self._rollback = Rollback(None, self.recall)

    def blank(self) -> None:
        """Count as empty, with tensors that nobody reads until they are overwritten: not for a graph."""
        self._blank = True

    def forget(self) -> None:
        """Let the tensors go as well."""
        self.state, self.is_initialized, self._blank = None, False, True
        self._writable = None, False

    @property
    def record_past(self) -> bool:
        """Whether tokens read from now on can be taken back by ``crop``."""
        return self._rollback is not None

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._rollback = (self._rollback or Rollback(self._to_read(), self.recall)) if value else None

    def activate_past_recording(self) -> None:
        """Remember what is read from now on, so that ``crop`` can take it back: the state and at most 128 tokens."""
        self.record_past = True

    def remember(self, tokens: int) -> None:
        """Let ``tokens`` tokens be taken back from now on, if that is more."""
        self.recall = max(self.recall, tokens)
        if self._rollback is not None:
            self._rollback.limit = self.recall

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError where ``crop`` could not take so many tokens back."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, wanted a negative number: how many tokens to take back"
            )
        if tokens_to_remove and self._rollback is None:
            raise ValueError(
                "a constant-size state cannot be cropped: what earlier tokens left in it cannot be taken out. Call "
                "cache.activate_past_recording() before the tokens to take back, or keep a copy.deepcopy of the cache"
            )
        if self._rollback is not None and -tokens_to_remove > self._rollback.tokens():
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, but only the last {self._rollback.tokens()} tokens are "
                f"remembered: those since the last crop, at most {self.recall}"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back; those before them then stay. Raises as ``check_crop``."""
        self.check_crop(tokens_to_remove)
        if self._rollback is None:
            return
        if tokens_to_remove:
            state = self._rollback.without(-tokens_to_remove)
            if state is None:
                self.reset()
            else:
                self.set_state(state)
        self._rollback = Rollback(self.state, self.recall)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        if self.state is not None:
            self.set_state(select_sequences(self.state, indices))
        if self._rollback is not None:
            self._rollback.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times in place."""
        if self.state is not None:
            rows = torch.arange(self.state.position.shape[0], device=self.state.position.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def copy(self, seen: SeenPositions) -> LizardCacheLayer:
        """An independent layer in the same state, of a cache that counts with ``seen``."""
        new = LizardCacheLayer(seen, self.is_compileable)
        new.is_initialized, new.recall = self.is_initialized, self.recall
        if self.state is not None:
            new.set_state(self.state)
        new._blank = self._blank
        if self._rollback is not None:
            new._rollback = self._rollback.copy()
        return new

    def __getstate__(self) -> dict[str, Any]:
        if self._rollback is not None:
            raise ValueError("a cache that records its past cannot be pickled: crop(0) and record_past=False first")
        return self.__dict__

    def check_move(self) -> None:
        """Raises ValueError where ``to`` could not move the layer."""
        if self._rollback is not None:
            raise ValueError("a cache that records its past cannot be moved: crop(0) and record_past=False first")

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Move the state; dtype is that of keys and values, sums and gates stay float32 (float64 with it).

        Raises as ``check_move``.
        """
        self.check_move()
        if self.state is None:
            return
        state = moved_state(self.state, device, dtype)
        self.forget()
        self.set_state(state)

    def offload(self) -> None:
        raise ValueError("the cache of a Lizard model is small and stays on its device: offloading is not supported")

    prefetch = offload


def fits(kept: State, new: State) -> bool:
    """Whether ``new`` has the fields and shapes of ``kept``, on its device."""
    held, wanted = tensors_of(kept), tensors_of(new)
    return held.keys() == wanted.keys() and all(
        t.shape == wanted[name].shape and t.device == wanted[name].device for name, t in held.items()
    )


def own_memory(state: State, others: tuple[Tensor | None, ...]) -> bool:
    """Whether every tensor of the state fills memory of its own, which none of the others lies in."""
    if torch.jit.is_tracing():
        return False
    taken = {t.untyped_storage().data_ptr() for t in others if t is not None}
    for t in tensors_of(state).values():
        memory = t.untyped_storage()
        place = memory.data_ptr()
        if place in taken or memory.nbytes() != t.nbytes or not t.is_contiguous():
            return False
        taken.add(place)
    return True


def split_blocks(
    blocks: list[AnchorBlock] | None, length: int
) -> tuple[list[AnchorBlock] | None, list[AnchorBlock] | None]:
    """The blocks of the first ``length`` positions, and those of the others."""
    if blocks is None:
        return None, None
    first: list[AnchorBlock] = []
    second: list[AnchorBlock] = []
    end = 0
    for block in blocks:
        inside = min(max(length - end, 0), block.length)
        end += block.length
        for kept, part in ((first, inside), (second, block.length - inside)):
            if part:
                kept.append(block._replace(length=part))
    return first, second


def is_writable(state: State) -> bool:
    """Whether the tensors may be overwritten: in no graph of gradients, and not left by inference mode to the world."""
    tensors = tensors_of(state).values()
    for t in tensors:  # a loop: this is asked before every step of every layer
        if t.requires_grad:
            return False
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return True
    return not any(t.is_inference() for t in tensors)
