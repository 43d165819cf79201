"""The cache of a Lizard model: constant size, behind transformers' Cache interface."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

from lizard_layers import copy_together, empty_state, state_bytes, tensors_of
from lizard_models.model.cache_layer import LizardCacheLayer
from lizard_models.model.cache_name import CACHE
from lizard_models.model.graphs import SeenPositions, is_graphed, mark_static
from lizard_models.model.layer_configs import attention_config, converted_layers


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
        self.mask_columns = max_cache_len if static else None  # that the mask of a static cache may have
        self.seen = SeenPositions()
        for i in converted:
            layers[i] = LizardCacheLayer(self.seen, static)
        super().__init__(layers=layers)
        self.lizard_config = config
        self.padded = False  # whether padding may have been read
        self.read_mask: Tensor | None = None  # [B, positions so far] bool of the last forward with padding

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

    def take(self, other: LizardCache) -> None:
        """Hold the states of another cache of the same model, in tensors of its own. Counts no positions."""
        layers = zip(self.lizard_layers(), other.lizard_layers(), strict=True)
        states = [(layer.place_for(of.state), of.state) for layer, of in layers if of.state is not None]
        pairs = [zip(tensors_of(a).values(), tensors_of(b).values(), strict=True) for a, b in states]
        copy_together(pair for of_a_layer in pairs for pair in of_a_layer)

    def blank(self) -> None:
        """Forget every sequence, where the next forward reads a text eagerly: it overwrites every state as it is."""
        for layer in self.lizard_layers():
            layer.blank()
        self.seen.reset()
        self.padded, self.read_mask = False, None

    def expect(self, batch_size: int, positions: int = 0) -> None:
        """Raises ValueError where so many rows, or so many new positions, do not fit what the cache holds."""
        seen = self.seen.on_host or 0
        window = getattr(self.lizard_config, "sliding_window", None) or 0
        for layer in self.layers:
            holds_all = isinstance(layer, StaticLayer) and not (layer.is_sliding and layer.max_cache_len >= window)
            if holds_all and seen + positions > layer.max_cache_len:
                raise ValueError(
                    f"past_key_values: has seen {seen} positions and gets {positions}, but its kept softmax layers "
                    f"hold max_cache_len={layer.max_cache_len}: make a longer one"
                )
        held = {rows for layer in self.layers if (rows := rows_of(layer)) is not None}
        if not held <= {batch_size} and self.seen.value():
            raise ValueError(f"past_key_values holds {held.pop()} rows, but the inputs have {batch_size}")

    def make_ready(self, batch_size: int) -> None:
        """Let go of tensors, made for other rows or by inference mode, that the next forward could not write to."""
        self._leave_inference_mode()
        if {rows_of(layer) for layer in self.layers} <= {batch_size, None}:
            return
        for layer in self.layers:
            if isinstance(layer, LizardCacheLayer):
                layer.forget()
            elif layer.is_initialized:
                layer.reset()
                layer.is_initialized = False  # a static layer allocates for its first rows
        self.padded, self.read_mask = False, None

    def _leave_inference_mode(self) -> None:
        """Let static kept softmax layers that were filled in inference mode be written to outside it."""
        if torch.is_inference_mode_enabled():
            return
        for layer in self.layers:
            if isinstance(layer, StaticLayer) and layer.keys is not None and layer.keys.is_inference():
                for name in ("keys", "values", "cumulative_length"):
                    setattr(layer, name, getattr(layer, name).clone())
                    mark_static(getattr(layer, name))

    def advance(self, positions: int) -> None:
        """Count positions that every layer has read."""
        states = [layer.state for layer in self.lizard_layers() if layer.state is not None]
        self.seen.add(positions, states[0].position.device if states else None)

    def check_mask(self, past_mask: Tensor | None) -> None:
        """Raises ValueError where a mask [B, seen] of what was read disagrees with what the states hold of it.

        A state holds every token it has read and no other, so a mask cannot take one out later, nor put one in; None
        says that there was no padding. A state knows how many tokens, a cache with kept softmax layers also which.
        Reads the data: not for a graph.
        """
        positions = self.positions()
        if positions is None:
            return
        if past_mask is None:
            told: Tensor = torch.full_like(positions, self.get_seq_length())
        else:
            told = past_mask.sum(1).to(positions.device)
        wrong = told != positions
        if past_mask is not None and self.read_mask is not None and len(self.lizard_layers()) < len(self.layers):
            columns = min(self.read_mask.shape[1], past_mask.shape[1])
            read = self.read_mask[:, :columns].to(past_mask.device)
            wrong = wrong | (read != past_mask[:, :columns]).any(1).to(wrong.device)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            said = "None, which says" if past_mask is None else "a mask that says"
            other = " elsewhere" if int(told[row]) == int(positions[row]) else ""
            raise ValueError(
                f"attention_mask: got {said} that {int(told[row])} of the cached positions of row {row} are real tokens"
                f"{other}, but past_key_values has read {int(positions[row])}{other and ' other ones'}, and a state "
                "cannot forget a token or add one later. Give the mask with which they were read (cache.inputs_for "
                "makes it), or the whole text without past_key_values"
            )

    def mask_of_the_past(self) -> Tensor | None:
        """A mask [B, seen] bool that agrees with what was read; None before the first token."""
        seen, start = self.get_seq_length(), self.positions()
        if start is None or not seen:
            return None
        if self.read_mask is not None:
            later = self.read_mask.new_ones(start.shape[0], seen - self.read_mask.shape[1])
            return torch.cat([self.read_mask, later], 1)
        return torch.arange(seen, device=start.device) >= seen - start.unsqueeze(1)

    def known_length(self) -> int | None:
        """``get_seq_length`` without waiting for the device; None where a graph has counted."""
        return None if is_graphed(self.seen.on_device) else self.seen.on_host

    def place_in_mask(self, attention_mask: Tensor, length: int) -> tuple[Tensor, Tensor | int | None]:
        """A mask [B, past + T] of what is known here of one [B, max_cache_len], and None: its last T columns are new.

        In a graph, where the number of columns must not grow, the whole mask, and where its T new columns begin. Other
        masks come back as they are.
        """
        if self.mask_columns is None or attention_mask.ndim != 2 or attention_mask.shape[1] != self.mask_columns:
            return attention_mask, None
        if is_graphed(attention_mask):
            return attention_mask, self.seen.value_in_graph()
        return attention_mask[:, : self.seen.value() + length], None

    @property
    def is_linear(self) -> list[bool]:
        """True for converted layers beside kept softmax ones, so that masks take their sizes from these.

        Not where all are converted: since 5.24 ``generate`` reads a whole text into a cache of linear layers alone,
        whatever it has read of it before.
        """
        kept = len(self.lizard_layers()) < len(self.layers)
        return [kept and isinstance(layer, LizardCacheLayer) for layer in self.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions seen, padding included."""
        converted = self.lizard_layers()
        return converted[0].get_seq_length() if converted else self.layers[layer_idx].get_seq_length()

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Positions before the queries, as masks of the kept softmax layers count them: a tensor in a static cache."""
        return self.layers[self._masked_with(layer_idx)].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers, of a kept softmax layer wherever there is one."""
        return super().get_mask_sizes(query_length, self._masked_with(layer_idx))

    def _masked_with(self, layer_idx: int) -> int:
        """The layer whose mask is asked for: up to 5.20 transformers names the first without a sliding window, which
        may be a converted one, and its mask is read by the kept ones."""
        kept = (
            i for i, layer in enumerate(self.layers) if not isinstance(layer, LizardCacheLayer) and not layer.is_sliding
        )
        return next(kept, layer_idx) if isinstance(self.layers[layer_idx], LizardCacheLayer) else layer_idx

    def inputs_for(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """What ``generate`` or a forward takes to go on from this cache with new tokens [B, T].

        attention_mask [B, T] marks padding among them. Raises ValueError for another number of rows, and where kept
        softmax layers hold padding, of which only the caller's mask of the whole text knows the places.
        """
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen, start = self.get_seq_length(), self.positions()
        if start is None:
            return {"input_ids": input_ids, "attention_mask": new, CACHE: self}
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
        return {"input_ids": input_ids, "attention_mask": mask, CACHE: self}

    def positions(self) -> Tensor | None:
        """Position [B] int64 of each row's next token, padding not counted. None before the first state."""
        for layer in self.lizard_layers():
            if layer.state is not None:
                return layer.state.position
        return None

    def reset(self) -> None:
        """Forget every sequence; the tensors of converted layers stay where they are."""
        self._leave_inference_mode()
        super().reset()
        self.seen.reset()
        self.padded, self.read_mask = False, None

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row b becomes what row beam_idx[b] was."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``. Raises ValueError, before anything changes, beside static kept softmax layers."""
        self._refuse_other_rows("batch_select_indices")
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times in place. Raises as ``batch_select_indices``."""
        self._refuse_other_rows("batch_repeat_interleave")
        super().batch_repeat_interleave(repeats)
        if self.read_mask is not None:
            self.read_mask = self.read_mask.repeat_interleave(repeats, 0)

    def _refuse_other_rows(self, call: str) -> None:
        for layer in self.layers:
            if not hasattr(layer, call):
                raise ValueError(
                    f"{call}: a {type(layer).__name__} keeps the rows it was made for: use a cache that is not static"
                )

    def _select_rows(self, rows: Tensor) -> None:
        if self.read_mask is not None:
            self.read_mask = self.read_mask[rows.to(self.read_mask.device)]

    def activate_past_recording(self, tokens: int = 0) -> None:
        """Remember what is read from now on, so that ``crop`` can take the last of it back.

        tokens: how many at least; 128 per layer can be taken back in any case.
        """
        for layer in self.lizard_layers():
            layer.remember(tokens)
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
        for layer in self.layers:
            if tokens_to_remove or isinstance(layer, LizardCacheLayer) or getattr(layer, "record_past", False):
                layer.crop(tokens_to_remove)  # 0 only ends what is recorded: other layers have nothing to end
        self.seen.add(tokens_to_remove)
        if tokens_to_remove and self.read_mask is not None:
            self.read_mask = self.read_mask[:, : self.get_seq_length()]

    def copy(self) -> LizardCache:
        """An independent cache in the same state."""
        new = copy.copy(self)
        new.seen = self.seen.copy()
        new.layers = [
            layer.copy(new.seen) if isinstance(layer, LizardCacheLayer) else copy_kept(layer) for layer in self.layers
        ]
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> LizardCache:
        return self.copy()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LizardCache:
        """Move every layer, as ``Module.to`` does, and return itself. dtype is that of keys and values.

        Sums and gates stay float32, or become float64 with it. Raises ValueError, before anything moves, while the past
        is recorded.
        """
        for layer in self.lizard_layers():
            layer.check_move()
        for layer in self.layers:
            if isinstance(layer, LizardCacheLayer):
                layer.to(device, dtype)
            elif layer.is_initialized:
                move_kept(layer, device, dtype)
        if self.seen.on_device is not None and device is not None:
            self.seen.live_on(torch.device(device))
        if self.read_mask is not None:
            self.read_mask = self.read_mask.to(device=device)
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


def move_kept(layer: Any, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Move all tensors of a kept softmax layer; dtype is that of keys and values alone, not of counters."""
    for name, t in vars(layer).items():
        if isinstance(t, Tensor):
            setattr(layer, name, t.to(device=device, dtype=dtype if t.is_floating_point() else None))
            if isinstance(layer, StaticLayer):
                mark_static(getattr(layer, name))
    layer.dtype, layer.device = layer.keys.dtype, layer.keys.device


def copy_kept(layer: Any) -> Any:
    """An independent kept softmax layer; keys and values may be in a graph of gradients, which a deepcopy refuses."""
    new = copy.copy(layer)
    for name, t in vars(layer).items():
        if isinstance(t, Tensor):
            setattr(new, name, t.clone())
            if isinstance(layer, StaticLayer):
                mark_static(getattr(new, name))
    return new


def rows_of(layer: Any) -> int | None:
    """The number of rows a layer has tensors for; None where it has none."""
    if isinstance(layer, LizardCacheLayer):
        return None if layer.state is None else layer.state.position.shape[0]
    return layer.keys.shape[0] if layer.is_initialized and layer.keys.ndim == 4 else None


def empty_cache(model: Any) -> Cache:
    """The cache a model streams into: its own constant-size one, or keys and values for other models."""
    return model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)
