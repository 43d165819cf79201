"""``generate`` from states of prefixes."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from lizard_models.model.cache import LizardCache, rows_of
from lizard_models.model.cache_layer import LizardCacheLayer
from lizard_models.model.cache_name import CACHE
from lizard_models.model.prefix.store import PrefixStates
from lizard_models.model.state_file import fill_cache

logger = logging.get_logger(__name__)

PIECE = 4096  # tokens that are read at a time


class _Call:
    """One call of ``generate``: its store, and the cache that its prompt went into."""

    def __init__(self, store: PrefixStates, asked: bool) -> None:
        self.store, self.asked = store, asked  # asked: by this call, and not for all calls of the model
        self.cache: LizardCache | None = None

    def cannot(self, why: str) -> None:
        """Raises ValueError where the call itself asked for a store."""
        if self.asked:
            raise ValueError(f"prefix_states: {why}; wanted one text whose tokens are all here, without prefix_states")
        self.store.count(texts=1, skipped=1)


_CALL: ContextVar[_Call | None] = ContextVar("_CALL", default=None)


class ReadsFromPrefixes:
    """Mixed into a causal language model: ``generate(prefix_states=...)``."""

    prefix_states: PrefixStates | None = None
    """The store that every call of ``generate`` uses; None for none."""

    def generate(
        self: Any, *args: Any, prefix_states: PrefixStates | Literal[False] | None = None, **kwargs: Any
    ) -> Any:
        """As transformers', where ``prefix_states`` may hold what the prompt begins with, and keeps what it reads.

        None takes the model's own ``prefix_states``, False no store. Raises ValueError for another type, and, if it is
        given here, for calls that a store does not help: several different texts, padding, a cache that has read
        something, no cache, embeddings, position ids of one's own, drafts, a static cache with kept softmax layers,
        mode "teacher", adapters. With the model's own store these go without, and are counted as skipped.
        """
        if not (prefix_states is None or prefix_states is False or isinstance(prefix_states, PrefixStates)):
            raise ValueError(f"prefix_states: got {type(prefix_states).__name__}, wanted a PrefixStates, None or False")
        store = self.prefix_states if prefix_states is None else (prefix_states or None)
        token = _CALL.set(None if store is None else _Call(store, prefix_states is not None))
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            _CALL.reset(token)

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = super()._sample(*args, **kwargs)  # type: ignore[misc]
        call = _CALL.get()
        if call is not None and call.cache is not None:
            _keep_the_end(self, call.store, call.cache, getattr(output, "sequences", output))
        return output

    def _prefill(
        self: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        call = _CALL.get()
        if call is not None:
            cache: Any = model_kwargs.get(CACHE)
            why = _why_not(self, input_ids, model_kwargs)
            if why is not None:
                call.cannot(why)
            else:
                piece = generation_config.prefill_chunk_size or PIECE
                _read_but_the_last(self, call, input_ids, cache, piece)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (call := _CALL.get()) is not None:
            call.cannot("drafts (an assistant, prompt lookup) read the text by themselves")
        return super()._assisted_decoding(*args, **kwargs)  # type: ignore[misc]


def _why_not(model: Any, ids: Tensor, model_kwargs: dict[str, Any]) -> str | None:
    """Why a store does not help this call; None where it does."""
    cache, mask, positions = (model_kwargs.get(name) for name in (CACHE, "attention_mask", "position_ids"))
    if not isinstance(cache, LizardCache):
        return f"there is no constant-size cache (use_cache=False or mode {model.mode!r})"
    if model_kwargs.get("inputs_embeds") is not None:
        return "inputs_embeds are no tokens to find a text by"
    if cache.get_seq_length():
        return f"past_key_values has read {cache.get_seq_length()} positions that are not here"
    if any(layer.record_past for layer in cache.lizard_layers()):
        return "past_key_values records its past, which must begin with the text"
    if mask is not None and not bool(mask.all()):
        return "the text has padding"
    if bool((ids != ids[:1]).any()):
        return f"input_ids holds {len(ids)} different texts"
    if positions is not None and bool((positions != torch.arange(ids.shape[1], device=positions.device)).any()):
        return "position_ids do not count from 0"
    if not all(isinstance(layer, LizardCacheLayer | DynamicLayer) for layer in cache.layers):
        return "a static cache with kept softmax layers takes no states"
    return None


@torch.no_grad()
def _read_but_the_last(model: Any, call: _Call, ids: Tensor, cache: LizardCache, piece: int) -> None:
    """Fill ``cache`` with all tokens of the text but the last, of which a state may hold the first."""
    tokens, ids, store = ids[0].cpu(), ids.to(model.device), call.store
    try:
        found, common = store.longest(model, tokens)
    except ValueError as error:  # no identity
        call.cannot(str(error).removeprefix("prefix_states: "))
        return
    call.cache = cache
    read, end = 0, len(tokens) - 1
    if found is not None:
        rows = ids.shape[0]
        copies = {name: t.to(ids.device).repeat(rows, *(1,) * (t.ndim - 1)) for name, t in found.tensors.items()}
        fill_cache(cache, copies, read := len(found.tokens))
    store.count(texts=1, found_tokens=read, read_tokens=len(tokens) - read)
    logger.info(f"prefix states: {read} of {len(tokens)} tokens were read before")
    for stop in (common, end) if read + store.least <= common < end else (end,):
        for start in range(read, stop, piece):
            model.model(input_ids=ids[:, start : min(start + piece, stop)], past_key_values=cache, use_cache=True)
        if stop > read:
            store.keep(model, tokens[:stop], cache)
            read = stop


def _keep_the_end(model: Any, store: PrefixStates, cache: LizardCache, sequences: Tensor) -> None:
    """Keep what the cache holds of one text that is written: all of it but the token that was written last."""
    alone = len(sequences) == 1 and {rows_of(layer) for layer in cache.layers} == {1}
    if alone and cache.get_seq_length() == sequences.shape[1] - 1:
        store.keep(model, sequences[0, :-1].cpu(), cache)
