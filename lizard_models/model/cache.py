"""The cache of a Lizard model: constant size, behind transformers' Cache interface."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, StaticCache

from lizard_layers import (
    AnchorBlock,
    AttentionState,
    HybridAttention,
    empty_state,
    map_state,
    overwrite,
    select_sequences,
    state_bytes,
)
from lizard_models.model.layer_configs import attention_config, converted_layers
from lizard_models.model.rollback import LIMIT, Rollback

OF_KEYS = ("ring_k", "ring_v", "ring_fk", "anchor_k", "anchor_v", "conv_k")  # in the dtype of keys and values


class SeenPositions:
    """How many positions a cache has seen, padding included.

    Python counts them until a step is traced by torch.compile or captured in a CUDA graph, of which Python sees no
    replay. From then on the tensor alone is right, and reading it waits for the device.
    """

    def __init__(self) -> None:
        self.on_host: int | None = 0
        self.on_device: Tensor | None = None

    def add(self, positions: int) -> None:
        """Count so many more. Must be told of the device by ``live_on`` first if a graph may replay it."""
        if self.on_device is not None:
            self.on_device.add_(positions)
        if is_graphed(self.on_device):
            self.on_host = None
        elif self.on_host is not None:
            self.on_host += positions

    def live_on(self, device: torch.device) -> None:
        """Count on this device too."""
        if self.on_device is None:
            with outside_inference_mode():
                self.on_device = torch.tensor(self.on_host, device=device)
            mark_static(self.on_device)
        elif self.on_device.device != device:
            self.on_device = self.on_device.to(device)

    def value(self) -> int:
        """The count."""
        if self.on_host is not None:
            return self.on_host
        assert self.on_device is not None
        return int(self.on_device)

    def reset(self) -> None:
        """Back to 0, still on the device alone if it was."""
        if self.on_device is not None:
            self.on_device.zero_()
        if self.on_host is not None:
            self.on_host = 0

    def copy(self) -> SeenPositions:
        """An independent one."""
        new = SeenPositions()
        new.on_host, new.on_device = self.on_host, None if self.on_device is None else self.on_device.clone()
        return new


class LizardCacheLayer(CacheLayerMixin):
    """The state of one converted layer. Its tensors have their final size from the first token on.

    Where no gradients are recorded they also keep their addresses: steps, prefills and reorders of the same number of
    rows write into them.
    """

    is_sliding = False  # the sliding window of a kept layer is another size, and masks are made for that one
    is_croppable = True
    supports_early_init = False

    def __init__(self, seen: SeenPositions | None = None, static: bool = False) -> None:
        super().__init__()
        self.state: AttentionState | None = None
        self.seen = seen or SeenPositions()
        self.is_compileable = static
        self._rollback: Rollback | None = None
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
        outputs, early = [], max(0, x.shape[1] - LIMIT)
        blocks, late_blocks = split_blocks(anchor_blocks, early)
        if early:  # read in two pieces, of which only the second can be taken back
            piece = tuple(None if t is None else t[:, :early] for t in inputs)
            outputs.append(self._read(attention, before, piece, blocks))
            before, self._rollback = self.state, Rollback(self.state)
        piece = tuple(None if t is None else t[:, early:] for t in inputs)
        self._rollback.record(attention, before, piece)
        outputs.append(self._read(attention, before, piece, late_blocks))
        return torch.cat(outputs, 1)

    def _read(
        self,
        attention: HybridAttention,
        state: AttentionState | None,
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
            self.set_state(state)
        return o

    def _to_read(self) -> AttentionState | None:
        """The state, or None where it is known to be empty."""
        if not is_graphed(self.seen.on_device) and self._blank and self.seen.on_host == 0:
            return None
        return self.state

    def set_state(self, state: AttentionState) -> None:
        """Keep this state: in the memory of the one before where it fits, in memory of its own elsewhere."""
        self._blank = False
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in state)
        if recorded:
            self.state = state
        elif self.state is not None and is_writable(self.state) and fits(self.state, state):
            overwrite(self.state, state)
        else:
            with outside_inference_mode():
                self.state = map_state(state, lambda t: t.clone(memory_format=torch.contiguous_format))
            for t in self.state:
                mark_static(t)
        self.is_initialized = True

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
            for name, t in self.state._asdict().items():
                if t is not None:
                    t.fill_(-torch.inf) if name == "log_scale" else t.zero_()
        else:
            self.forget()
        if self._rollback is not None:
            self._rollback = Rollback(None)

    def forget(self) -> None:
        """Let the tensors go as well."""
        self.state, self.is_initialized, self._blank = None, False, True

    @property
    def record_past(self) -> bool:
        """Whether tokens read from now on can be taken back by ``crop``."""
        return self._rollback is not None

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._rollback = (self._rollback or Rollback(self._to_read())) if value else None

    def activate_past_recording(self) -> None:
        """Remember what is read from now on, so that ``crop`` can take it back: the state and at most 128 tokens."""
        self.record_past = True

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
                f"remembered: those since the last crop, at most {LIMIT}"
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
        self._rollback = Rollback(self.state)

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
        new.is_initialized = self.is_initialized
        if self.state is not None:
            new.set_state(self.state)
        new._blank = self._blank
        if self._rollback is not None:
            new._rollback = self._rollback.copy()
        return new

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Move the state; dtype is that of keys and values, sums and gates stay float32 (float64 with it)."""
        if self._rollback is not None:
            raise ValueError("a cache that records its past cannot be moved: crop(0) and record_past=False first")
        if self.state is None:
            return
        work = torch.float64 if dtype == torch.float64 else torch.float32
        moved = {}
        for name, t in self.state._asdict().items():
            if t is not None:
                kind = t.dtype if dtype is None or name == "position" else dtype if name in OF_KEYS else work
                moved[name] = t.to(device=device, dtype=kind)
        self.forget()
        self.set_state(AttentionState(**moved))

    def offload(self) -> None:
        raise ValueError("the cache of a Lizard model is small and stays on its device: offloading is not supported")

    prefetch = offload


class LizardCache(Cache):
    """One ``LizardCacheLayer`` a converted layer, the family's ordinary cache layer for each kept softmax.

    It grows only by what kept softmax layers store. ``copy`` or ``copy.deepcopy`` take a snapshot; two caches are
    independent. Steps without gradients overwrite its tensors, so keep a copy and not a reference to them.

    static: for decoding under torch.compile or in a CUDA graph; kept softmax layers then hold ``max_cache_len``
    positions and no more. Raises ValueError for such layers without ``max_cache_len``.
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, *, static: bool = False, max_cache_len: int | None = None) -> None:
        converted = converted_layers(config)
        if static and len(converted) < config.num_hidden_layers:
            if max_cache_len is None:
                raise ValueError(
                    "max_cache_len: got None, wanted the number of positions that the kept softmax layers of a static "
                    "cache hold"
                )
            layers = list(StaticCache(config=config, max_cache_len=max_cache_len).layers)
        else:
            layers = list(DynamicCache(config=config).layers)
        self.seen = SeenPositions()
        for i in converted:
            layers[i] = LizardCacheLayer(self.seen, static)
        super().__init__(layers=layers)
        self.lizard_config = config

    def lizard_layers(self) -> list[LizardCacheLayer]:
        """The layers with a constant-size state."""
        return [layer for layer in self.layers if isinstance(layer, LizardCacheLayer)]

    def allocate(
        self, batch_size: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> LizardCache:
        """Give every converted layer its tensors before the first token, e.g. to capture a graph; returns itself."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, LizardCacheLayer):
                layer.set_state(empty_state(attention_config(self.lizard_config, i), batch_size, dtype, device))
                layer.reset()
        self.seen.live_on(torch.device(device or "cpu"))
        return self

    def expect(self, batch_size: int) -> None:
        """Make ready for ``batch_size`` rows. Raises ValueError where it holds another number of them."""
        held = {layer.state.position.shape[0] for layer in self.lizard_layers() if layer.state is not None}
        if held <= {batch_size}:
            return
        if self.seen.value():
            raise ValueError(f"past_key_values holds {held.pop()} rows, but the inputs have {batch_size}")
        for layer in self.lizard_layers():
            layer.forget()

    def advance(self, positions: int) -> None:
        """Count positions that every layer has read."""
        if self.seen.on_device is None and not torch.compiler.is_compiling():
            states = [layer.state for layer in self.lizard_layers() if layer.state is not None]
            if states:
                self.seen.live_on(states[0].position.device)
        self.seen.add(positions)

    def known_length(self) -> int | None:
        """``get_seq_length`` without waiting for the device; None where a graph has counted."""
        return None if is_graphed(self.seen.on_device) else self.seen.on_host

    @property
    def is_linear(self) -> list[bool]:
        """True for converted layers, so that masks take their sizes from the kept softmax ones."""
        return [isinstance(layer, LizardCacheLayer) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, padding included."""
        converted = self.lizard_layers()
        return converted[0].get_seq_length() if converted else self.layers[layer_idx].get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Positions before the queries, as masks of the kept softmax layers count them: a tensor in a static cache."""
        return self.layers[layer_idx].get_seq_length()

    def inputs_for(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """What ``generate`` or a forward takes to go on from this cache with new tokens [B, T].

        attention_mask [B, T] marks padding among them. Raises ValueError for another number of rows, and where kept
        softmax layers hold padding, of which only the caller's mask of the whole text knows the places.
        """
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen, start = self.get_seq_length(), self.positions()
        if start is None:
            return {"input_ids": input_ids, "attention_mask": new, "past_key_values": self}
        if start.shape[0] != input_ids.shape[0] or new.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and attention_mask have shapes {tuple(input_ids.shape)} and {tuple(new.shape)}, wanted "
                f"[{start.shape[0]}, T] as the cache has rows"
            )
        places = torch.arange(seen, device=start.device)
        past = (places >= seen - start.unsqueeze(1)).to(input_ids.device)  # a state knows how many, not where
        if len(self.lizard_layers()) < len(self.layers) and not bool(past.all()):
            raise ValueError("this cache has softmax layers and padding: give generate the mask of the whole text")
        mask = torch.cat([past.to(new.dtype), new], 1)
        return {"input_ids": input_ids, "attention_mask": mask, "past_key_values": self}

    def positions(self) -> Tensor | None:
        """Position [B] int64 of each row's next token, padding not counted. None before the first state."""
        for layer in self.lizard_layers():
            if layer.state is not None:
                return layer.state.position
        return None

    def reset(self) -> None:
        """Forget every sequence; the tensors of converted layers stay where they are."""
        super().reset()
        self.seen.reset()

    def activate_past_recording(self) -> None:
        """Remember what is read from now on, so that ``crop`` can take it back: at most 128 tokens a layer."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back, of those read since ``activate_past_recording``.

        Raises ValueError, before anything changes, for more tokens than are remembered, or kept softmax layers that
        cannot give any back.
        """
        for layer in self.layers:
            if tokens_to_remove and not layer.is_croppable:
                raise ValueError(f"a {type(layer).__name__} cannot be cropped: use a cache that is not static")
        for layer in self.lizard_layers():
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.seen.add(tokens_to_remove)

    def copy(self) -> LizardCache:
        """An independent cache in the same state."""
        new = copy.copy(self)
        new.seen = self.seen.copy()
        new.layers = [
            layer.copy(new.seen) if isinstance(layer, LizardCacheLayer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> LizardCache:
        return self.copy()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LizardCache:
        """Move every layer, as ``Module.to`` does, and return itself. dtype is that of keys and values.

        Sums and gates stay float32, or become float64 with it. Raises ValueError while the past is recorded.
        """
        for layer in self.layers:
            if isinstance(layer, LizardCacheLayer):
                layer.to(device, dtype)
            elif layer.is_initialized:
                layer.keys, layer.values = (t.to(device=device, dtype=dtype) for t in (layer.keys, layer.values))
                layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        if self.seen.on_device is not None and device is not None:
            self.seen.live_on(torch.device(device))
        return self

    def state_bytes(self) -> int:
        """Bytes held, those of kept softmax layers included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, LizardCacheLayer):
                total += 0 if layer.state is None else state_bytes(layer.state)
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total


def fits(kept: AttentionState, new: AttentionState) -> bool:
    """Whether ``new`` has the fields and shapes of ``kept``, on its device."""
    return all(
        a is None if b is None else a is not None and a.shape == b.shape and a.device == b.device
        for a, b in zip(kept, new, strict=True)
    )


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


def is_writable(state: AttentionState) -> bool:
    """Whether the tensors may be overwritten: in no graph of gradients, and not left by inference mode to the world."""
    if any(t is not None and t.requires_grad for t in state):
        return False
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return True
    return not any(t is not None and t.is_inference() for t in state)


def is_graphed(like: Tensor | None) -> bool:
    """Whether what runs now is traced by torch.compile or captured in a CUDA graph, to be replayed without Python."""
    if torch.compiler.is_compiling():
        return True
    return like is not None and like.is_cuda and torch.cuda.is_current_stream_capturing()


def outside_inference_mode() -> contextlib.AbstractContextManager:
    """A context whose new tensors may be written to anywhere."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def mark_static(t: Tensor | None) -> None:
    """Tell torch.compile that the address of t stays, so that its CUDA graphs write to it."""
    if t is not None and not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(t, guard=False)
