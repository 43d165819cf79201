"""Prompts of any length: read, tokenised and prefilled piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.streamers import TextStreamer

from lizard_models.model.cache import LizardCache, empty_cache
from lizard_models.model.cache_name import CACHE
from lizard_models.text.documents import in_template
from lizard_models.text.text_start import text_start
from lizard_models.text.token_stream import token_chunks, tokenise_pieces

PREFILL_CHUNK = 4096  # tokens of a prompt that are read at a time, so that its length takes no memory
PLACE = "\ue000"  # of the user's text in a chat template; a private-use character that no template holds


class Prefilled(NamedTuple):
    """A prompt that a model has read up to its last token."""

    cache: Cache
    last: Tensor  # [1, 1] int64, the token that is still to be read
    length: int  # tokens of the prompt, the last one included

    def generate_inputs(self) -> dict[str, Any]:
        """What ``model.generate`` takes to go on from here.

        transformers asks for a mask over the whole past: one byte a token, the only part that grows with the prompt.
        """
        device = self.last.device
        return {
            "input_ids": self.last,
            "attention_mask": torch.ones(1, self.length, dtype=torch.int8, device=device),
            "position_ids": torch.tensor([[self.length - 1]], device=device),
            CACHE: self.cache,
        }


@torch.no_grad()
def prefill(
    model: Any, tokens: Iterable[np.ndarray], chunk: int = PREFILL_CHUNK, cache: Cache | None = None
) -> Prefilled:
    """Reads all tokens but the last, ``chunk`` at a time; with a Lizard model in memory that does not depend on them.

    tokens: ids in pieces of any sizes, read as they are needed. cache: what was read before them, by default nothing.
    Raises ValueError if there are no tokens.
    """
    device = next(model.parameters()).device
    cache = empty_cache(model) if cache is None else cache
    length, last = cache.get_seq_length(), None
    for ids in token_chunks(tokens, chunk):
        row = torch.from_numpy(ids.astype(np.int64)).to(device)[None]
        new = row[:, :-1] if last is None else torch.cat([last, row[:, :-1]], 1)
        if new.shape[1]:
            model.model(input_ids=new, use_cache=True, **{CACHE: cache})
        last, length = row[:, -1:], length + len(ids)
    if last is None:
        raise ValueError("prompt is empty: give some text to continue")
    return Prefilled(cache, last, length)


@torch.no_grad()
def read_to_the_end(model: Any, prompt: Prefilled) -> LizardCache:
    """A cache that has read the last token too; the prompt's own stays as it is. For Lizard models alone."""
    if not isinstance(prompt.cache, LizardCache):
        raise ValueError("the model is not linearized: its cache grows with the text and has no state to save")
    cache = prompt.cache.copy()
    model.model(input_ids=prompt.last, use_cache=True, **{CACHE: cache})
    return cache


def prompt_tokens(
    pieces: Iterable[str], tokenizer: Any, chat: bool = False, goes_on: bool = False
) -> Iterator[np.ndarray]:
    """Ids of a prompt whose text comes in pieces: after the tokenizer's own start, or inside its chat template.

    goes_on: the text follows one that was read before, so that no start belongs before it.
    """
    if chat:
        template = in_template([{"role": "user", "content": PLACE}], tokenizer, add_generation_prompt=True)
        before, place, after = template.partition(PLACE)
        if not place or PLACE in after:
            raise ValueError("chat: the model's chat template does not take a user's text once; leave chat out")
        yield from tokenise_pieces(_around(before, pieces, after), tokenizer)
        return
    start, empty = [] if goes_on else text_start(tokenizer), True
    for ids in tokenise_pieces(pieces, tokenizer):
        if empty and start:
            yield np.asarray(start, dtype=np.int64)
        empty = False
        yield ids


def _around(before: str, pieces: Iterable[str], after: str) -> Iterator[str]:
    yield before
    yield from pieces
    yield after


class ContinuationStreamer(TextStreamer):
    """Prints what is generated as it goes on from the prompt, which is not printed again."""

    def put(self, value: Tensor) -> None:
        """The prompt's last token first, then a new token a call."""
        if not self.next_tokens_are_prompt:
            super().put(value)
            return
        self.next_tokens_are_prompt = False
        self.token_cache = value.flatten().tolist()
        self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))
