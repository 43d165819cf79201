"""Passkey retrieval: a number hidden in filler text, to be repeated at the end (after arXiv 2305.16300)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

OPENING = "There is a pass key hidden somewhere in the text below. Find it and remember it.\n\n"
FILLER = (
    "The river runs down to the sea. The fields lie still in the sun. A cart goes along the road, and another "
    "comes back. The wind turns the mill. "
)
KEY = "The pass key is {key}. Remember that {key} is the pass key. "
QUESTION = "\n\nWhat is the pass key? The pass key is"
DIGITS = 5


def passkey_prompt(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: float, key: str
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer, ``length`` ids together.

    depth: where the key stands in the filler, from 0 (start) to 1 (end). Raises ValueError if ``length`` cannot hold
    the question.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    opening, question, answer = encode(OPENING), encode(QUESTION), encode(f" {key}")
    needle, filler = encode(KEY.format(key=key)), encode(FILLER)
    room = length - len(opening) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"passkey length {length} is too short, the question alone takes {length - room} tokens")
    filler = filler * (room // len(filler) + 1)
    before = round(depth * room)
    return opening + filler[:before] + needle + filler[before:room] + question, answer


@torch.no_grad()
def passkey_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    trials: int = 10,
    seed: int = 0,
    batch_tokens: int = 4096,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[int, float]:
    """Share of keys that greedy generation repeats exactly, by length in tokens.

    Keys of five digits from ``seed``, at depths spread evenly over the text, the same for every model. As many prompts
    go through together as fit into ``batch_tokens``, at least one. advance: called with the number of prompts done.
    """
    device = next(model.parameters()).device
    accuracy = {}
    for length in lengths:
        draw = np.random.default_rng((seed, length))
        keys = ["".join(map(str, draw.integers(0, 10, DIGITS))) for _ in range(trials)]
        depths = [(i + 0.5) / trials for i in range(trials)]
        pairs = [passkey_prompt(tokenizer, length, depth, key) for depth, key in zip(depths, keys, strict=True)]
        right, batch_size = 0, max(1, batch_tokens // length)
        for start in range(0, trials, batch_size):
            batch = pairs[start : start + batch_size]
            prompts = torch.tensor([prompt for prompt, _ in batch], device=device)
            answers = torch.tensor([answer for _, answer in batch], device=device)
            generated = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=answers.shape[1],
                min_new_tokens=answers.shape[1],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
            right += int((generated[:, prompts.shape[1] :] == answers).all(1).sum())
            advance(len(batch))
        accuracy[length] = right / trials
    return accuracy
