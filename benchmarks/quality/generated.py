"""Measures by generation: prompts of any lengths, continued greedily, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lizard_models.text.text_start import text_start


class Question(NamedTuple):
    """A prompt without what the tokenizer puts before a text, what its continuation should hold, and how many tokens
    that may take."""

    prompt: list[int]
    wanted: list[str]
    room: int


@torch.no_grad()
def continuations(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_tokens: int
) -> list[str]:
    """The text that greedy generation puts after each prompt, in their order.

    What the tokenizer puts before a text (``text_start``) is put before each prompt.
    As many prompts of about one length go through together as fit into ``batch_tokens``, at least one, padded on the
    left. A text ends with the tokenizer's end, or after the most room that a question of its batch has.
    """
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    first = text_start(tokenizer)
    given = [first + question.prompt for question in questions]
    answers: dict[int, str] = {}
    order = sorted(range(len(questions)), key=lambda i: (len(given[i]), i))
    while order:
        batch = [order.pop()]
        width = len(given[batch[0]])
        while order and (len(batch) + 1) * width <= batch_tokens:
            batch.append(order.pop())
        prompts = torch.full((len(batch), width), pad, device=device)
        mask = torch.zeros_like(prompts)
        for row, i in enumerate(batch):
            prompts[row, width - len(given[i]) :] = torch.tensor(given[i], device=device)
            mask[row, width - len(given[i]) :] = 1
        ids = model.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=max(questions[i].room for i in batch),
            do_sample=False,
            pad_token_id=pad,
        )
        for i, row in zip(batch, ids[:, width:].tolist(), strict=True):
            answers[i] = str(tokenizer.decode(row, skip_special_tokens=True))
    return [answers[i] for i in range(len(questions))]
