"""What a tokenizer puts before a text: the one place that knows, for training, evaluation and prompts alike."""

from __future__ import annotations

from typing import Any, TypeVar

SAMPLE = "a"
Ids = TypeVar("Ids", bound=Any)  # a list, or an array


def text_start(tokenizer: Any) -> list[int]:
    """The ids that ``tokenizer(text)`` has before those of the text itself: [] for most, the beginning of a text for
    Gemma's and Llama's, which read badly without it.

    Text is tokenised without special tokens everywhere, since these would come at its end and before every piece too;
    whoever gives a model a text that starts puts these ids before it, unless its chat template has written them.

    Raises ValueError for a tokenizer whose special tokens change the ids of the text between them.
    """
    whole, bare = (tokenizer(SAMPLE, add_special_tokens=special)["input_ids"] for special in (True, False))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    raise ValueError(f"tokenizer: {SAMPLE!r} is {bare} without special tokens and {whole} with them; wanted the same")


def without_start(ids: Ids, start: list[int]) -> Ids:
    """The ids after ``start``, if they begin with it."""
    return ids[len(start) :] if list(ids[: len(start)]) == start else ids
