"""Passkey retrieval: a number hidden in filler text, to be repeated at the end (after arXiv 2305.16300)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lizard_models.text.text_start import text_start, without_start

# Worded so that SmolLM2-135M finds a key at 2048 tokens every time; without a word of the question to come, 4 in 10.
OPENING = (
    "One number matters in the long text below, and all the rest of it does not. Find the number and keep it in mind: "
    "at the end you will be asked for it.\n"
)
FILLER = (
    "The river runs down to the sea. The fields lie still in the sun. A cart goes along the road, and another "
    "comes back. The wind turns the mill. "
)
KEY = "The pass key is {key}. Keep it in mind. {key} is the pass key. "
QUESTION = "\nWhat is the pass key? The pass key is"
DIGITS = 5

MANY_OPENING = (
    "Some numbers matter in the long text below. Find them and keep them in mind: at the end you will be asked for "
    "one.\n"
)
MANY_KEY = "The pass key of the {owner} is {key}. Keep it in mind. {key} is the pass key of the {owner}. "
MANY_QUESTION = "\nWhat is the pass key of the {owner}? The pass key of the {owner} is"
OWNERS = ("miller", "baker", "doctor", "sailor", "teacher", "farmer", "painter", "hunter")
MANY_DIGITS = (5, 8)


def passkey_prompt(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: float, key: str, text: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer, ``length`` ids together. It begins as the tokenizer begins a text.

    The answer is the key alone: a space that is a token of its own before it ends the prompt, as a model that knows
    the key may as well go on with "the" or "a" there.

    depth: where the key stands in the text around it, from 0 (start) to 1 (end). text: ids of that text, of which the
    first are taken, but for such a beginning; None is a filler of four sentences again and again.

    Raises ValueError if ``length`` cannot hold the question, or is more than ``text`` fills.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    start = text_start(tokenizer)
    opening, (question, answer) = start + encode(OPENING), _asked(tokenizer, QUESTION, key)
    needle, filler = encode(KEY.format(key=key)), encode(FILLER)
    room = length - len(opening) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"passkey length {length} is too short, the question alone takes {length - room} tokens")
    filler = filler * (room // len(filler) + 1) if text is None else list(without_start(text, start))
    if len(filler) < room:
        raise ValueError(f"passkey length {length} takes {room} tokens of text around the key, got {len(filler)}")
    before = round(depth * room)
    return opening + filler[:before] + needle + filler[before:room] + question, answer


def several_passkeys_prompt(
    tokenizer: PreTrainedTokenizerBase, length: int, keys: Sequence[str], asked: int, owners: Sequence[str] = OWNERS
) -> tuple[list[int], list[int]]:
    """A prompt with several keys, spread evenly over the filler, each with an owner; one of them is asked for.

    Returns the token ids of prompt and answer, as ``passkey_prompt`` does. Raises ValueError if ``length`` cannot hold
    the keys, or there are more keys than ``owners``.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if len(keys) > len(owners):
        raise ValueError(f"keys: {len(keys)} of them, wanted at most {len(owners)}")
    opening, filler = text_start(tokenizer) + encode(MANY_OPENING), encode(FILLER)
    question, answer = _asked(tokenizer, MANY_QUESTION.format(owner=owners[asked]), keys[asked])
    needles = [encode(MANY_KEY.format(owner=owner, key=key)) for owner, key in zip(owners, keys, strict=False)]
    room = length - len(opening) - sum(map(len, needles)) - len(question) - len(answer)
    if room < 0:
        raise ValueError(f"passkey length {length} is too short, the keys alone take {length - room} tokens")
    filler = filler * (room // len(filler) + 1)
    cuts = [round(room * i / len(keys)) for i in range(len(keys) + 1)]
    body: list[int] = []
    for needle, start, end in zip(needles, cuts, cuts[1:], strict=False):
        middle = (start + end) // 2
        body += filler[start:middle] + needle + filler[middle:end]
    return opening + body + question, answer


def _asked(tokenizer: PreTrainedTokenizerBase, question: str, key: str) -> tuple[list[int], list[int]]:
    """Token ids of a question with the space after it, where that is a token, and of the key."""
    ids, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, f" {key}"))
    space = next(i for i, token in enumerate(answer) if str(tokenizer.decode([token])).strip())
    return ids + answer[:space], answer[space:]


def shortest_length(tokenizer: PreTrainedTokenizerBase, keys: int) -> int:
    """Tokens that a prompt with ``keys`` keys, each as long as any, takes without filler, answer included."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    start = len(text_start(tokenizer))
    if keys == 1:
        return start + sum(map(count, (OPENING, KEY.format(key="0" * DIGITS), QUESTION, " " + "0" * DIGITS)))
    key = "0" * MANY_DIGITS[1]
    needles = sorted(count(MANY_KEY.format(owner=owner, key=key)) for owner in OWNERS)[-keys:]
    questions = [count(MANY_QUESTION.format(owner=owner)) for owner in OWNERS]
    return start + count(MANY_OPENING) + sum(needles) + max(questions) + count(f" {key}")


def passkey_examples(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    *,
    keys: int = 1,
    seed: int = 0,
    texts: Tensor | None = None,
) -> list[tuple[list[int], list[int]]]:
    """``count`` prompts with their answers, ``length`` ids together; ``keys`` as in ``passkey_accuracy``.

    texts: of one key, rows [N, T] of ids to hide it in, each in turn; None is the filler.
    """
    if keys == 1:
        draw = np.random.default_rng((seed, length))
        drawn = ["".join(map(str, draw.integers(0, 10, DIGITS))) for _ in range(count)]
        around = [None] if texts is None else texts.tolist()
        return [
            passkey_prompt(tokenizer, length, (i + 0.5) / count, key, around[i % len(around)])
            for i, key in enumerate(drawn)
        ]
    draw = np.random.default_rng((seed, length, keys))
    pairs = []
    for trial in range(count):
        digits = draw.integers(MANY_DIGITS[0], MANY_DIGITS[1] + 1, keys)
        drawn = ["".join(map(str, draw.integers(0, 10, number))) for number in digits]
        owners = [OWNERS[i] for i in draw.permutation(len(OWNERS))]
        pairs.append(several_passkeys_prompt(tokenizer, length, drawn, trial % keys, owners))
    return pairs


@torch.no_grad()
def passkey_accuracy(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    trials: int = 10,
    keys: int = 1,
    seed: int = 0,
    batch_tokens: int = 4096,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[int, float]:
    """Share of keys that greedy generation repeats exactly, by length in tokens.

    keys=1: five digits, at depths spread evenly over the text. More: each of 5 to 8 digits with an owner, spread over
    the text, and one is asked for, each place in turn. They come from ``seed`` and are the same for every model. As
    many prompts go through together as fit into ``batch_tokens``, at least one. advance: called with the number of
    prompts done.
    """
    device = next(model.parameters()).device
    accuracy = {}
    for length in lengths:
        pairs = passkey_examples(tokenizer, length, trials, keys=keys, seed=seed)
        right = 0
        for batch in _batches(pairs, max(1, batch_tokens // length)):
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


@torch.no_grad()
def passkeys_found(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    trials: int = 10,
    texts: Tensor | None = None,
    seed: int = 0,
    batch_tokens: int = 4096,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[int, float]:
    """Share of keys of five digits of whose answers every token is the likeliest, by length in tokens.

    A prompt is read with its answer in one forward, so that no cache is needed: a greedy continuation is right in just
    these cases, but for the rounding of another form of the same attention. texts: rows [N, T] of ids to hide the keys
    in, each in turn, such as novels; None is the filler of ``passkey_accuracy``, with the keys that it draws. advance:
    called with the number of prompts done.

    Raises ValueError for a length that ``texts`` do not fill, or that cannot hold the question.
    """
    device = next(model.parameters()).device
    shares = {}
    for length in lengths:
        pairs = passkey_examples(tokenizer, length, trials, seed=seed, texts=texts)
        right = 0
        for batch in _batches(pairs, max(1, batch_tokens // length)):
            read = torch.tensor([prompt + answer[:-1] for prompt, answer in batch], device=device)
            answers = torch.tensor([answer for _, answer in batch], device=device)
            logits = model(input_ids=read, use_cache=False, logits_to_keep=answers.shape[1]).logits
            right += int((logits.argmax(-1) == answers).all(1).sum())
            advance(len(batch))
        shares[length] = right / trials
    return shares


def _batches(pairs: list[tuple[list[int], list[int]]], size: int) -> Iterator[list[tuple[list[int], list[int]]]]:
    """At most ``size`` prompts with answers of one length at a time."""
    groups: dict[int, list[tuple[list[int], list[int]]]] = {}
    for pair in pairs:
        groups.setdefault(len(pair[1]), []).append(pair)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
