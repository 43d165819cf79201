"""Rows of the user's own text in which something is asked for again: what a score of keys can learn from.

A teacher shows which keys it needs late only where the text needs them. Plain text seldom asks for a thing named a
thousand tokens before; so half of these rows say something twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lizard_models.text.sequences import PackedTokens, StreamedTokens

PASSAGE = (16, 128)  # tokens of a passage that comes again, at least and at most
DIGITS = (4, 8)  # of a number to look up
JOINTS = (": ", " = ", " - ", " -> ", " | ")  # between a record's name and its value
SENTENCES = (
    " The {name} is {value}.",
    " {value} is the {name}.",
    " Note the {name}: {value}.",
    " She wrote {value} beside the {name}.",
    " Of the {name} one thing is known, {value}.",
    " Ask for the {name} and you hear {value}.",
)  # that say a record in running text
QUESTIONS = (" What is the {name}? {value}.", " And the {name}? It is {value}.")  # that ask for one
WORD = re.compile(r"[^\W\d_]{4,}")
SHARE = 4  # at most one token in four is put in
BREAKS = ("\u0120", "\u010a", "\u2581", " ", "\n", "<0x0A>")  # how the tokens that begin a word or a line begin
REACH = 32  # tokens in which one of them is looked for


class Inserted(NamedTuple):
    """Tokens to be put into a row, in front of token ``at`` of its text."""

    at: int
    ids: Sequence[int]


def look_up_rows(
    dataset: PackedTokens | StreamedTokens,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    *,
    gap: int = 256,
    seed: int = 0,
    in_all: bool = False,
) -> PackedTokens:
    """``count`` rows out of those of ``dataset``, of the same length: every second one as it is, and of the others

    - half with **passages** of 16 to 128 tokens that come again, word for word, and
    - half with **records**, a name and a value each, that come again later: half as lines of a list (``name: value``),
      half as sentences of running text, said in one way and asked for in another. Names are words of the row's own
      text, and so are half of the values; the others are numbers of 4 to 8 digits.

    What comes again is put in at least ``gap`` tokens after the first time, at places drawn evenly over the row; it
    pushes the row's own tokens back, of which the last fall off, at most a quarter of them. Records stand between two
    words. Without a tokenizer, or in a row without words, passages stand in for records. A data set with fewer rows
    than ``count`` gives its rows again, with other things asked for.

    dataset: items {"input_ids": [T]}; of a stream its first rows are taken. seed: of all draws; rows with one seed are
    the same rows, and the first of them do not depend on ``count``, but for their order. in_all: something comes again
    in every row, none stays as it is.

    Raises ValueError for a ``count`` below 1, a ``gap`` below 0, an empty data set, or rows of fewer than 128 or
    2 ``gap`` tokens.
    """
    if count < 1 or gap < 0:
        raise ValueError(f"count must be at least 1 and gap at least 0, got {count} and {gap}")
    rows = [item["input_ids"].numpy() for item in islice(items(dataset), count)]
    if not rows:
        raise ValueError("data: the data set gave no row; wanted text for at least one sequence")
    length = len(rows[0])
    shortest = max(2 * gap, 2 * SHARE * PASSAGE[0])
    if length < shortest:
        raise ValueError(f"rows of {length} tokens are too short for gap={gap}: wanted at least {shortest}")
    made = []
    for i in range(count):
        row, draw = rows[i % len(rows)], np.random.default_rng((seed, i))
        inserted: list[Inserted] = []
        kind = 2 * i + 1 if in_all else i  # 0 and 2 modulo 4 are rows as they are
        if kind % 4 == 3 and tokenizer is not None:
            inserted = records(row, tokenizer, gap, draw)
        if kind % 2 == 1 and not inserted:
            inserted = passages(row, gap, draw)
        made.append(put_in(row, inserted))
    return PackedTokens(np.concatenate(made), length, seed)


def passages(row: np.ndarray, gap: int, draw: np.random.Generator) -> list[Inserted]:
    """Passages of ``row`` [T] that come again, as many as a quarter of it holds, and no two of them from one place."""
    room, found, taken = len(row) // SHARE, [], np.zeros(len(row), dtype=bool)
    for _ in range(len(row) // PASSAGE[0]):
        size = int(draw.integers(PASSAGE[0], min(PASSAGE[1], room) + 1)) if room >= PASSAGE[0] else 0
        last = len(row) * (SHARE - 1) // SHARE  # text from here on may fall off
        if not size or last - gap - size < 1:
            break
        start = int(draw.integers(last - gap - size))
        if not taken[start : start + size].any():
            taken[start : start + size] = True
            at = int(draw.integers(start + size + gap, last + 1))
            found.append(Inserted(at, row[start : start + size].tolist()))
            room -= size
    return [_outside(one, taken) for one in found]


def records(row: np.ndarray, tokenizer: PreTrainedTokenizerBase, gap: int, draw: np.random.Generator) -> list[Inserted]:
    """Records made of words of ``row`` [T], each twice, as many as a quarter of it holds; none if it has few words.

    The first time and the second of each stand one behind the other in what is returned.
    """
    words = sorted(set(WORD.findall(str(tokenizer.decode(row.tolist())))))
    if len(words) < 8:
        return []
    room, last, found, names = len(row) // SHARE, len(row) * (SHARE - 1) // SHARE, [], set()
    pieces = tokenizer.convert_ids_to_tokens(row.tolist())

    def between_words(place: int, least: int, most: int) -> int:
        """The next place in front of a word, else the one before, else ``place``; from ``least`` to ``most``."""
        ahead, back = range(place, min(place + REACH, most) + 1), range(place, max(place - REACH, least) - 1, -1)
        return next((i for i in (*ahead, *back) if i == 0 or pieces[i].startswith(BREAKS)), place)

    for _ in range(len(row) // (2 * PASSAGE[0])):
        name = " ".join(draw.choice(words, int(draw.integers(1, 3)), replace=False))
        if draw.random() < 0.5:
            value = " ".join(draw.choice(words, int(draw.integers(1, 4)), replace=False))
        else:
            value = "".join(map(str, draw.integers(0, 10, int(draw.integers(DIGITS[0], DIGITS[1] + 1)))))
        said, asked = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in _record(name, value, draw))
        if name in names or len(said) + len(asked) > room:
            continue
        names.add(name)
        first = between_words(int(draw.integers(last - gap)), 0, last - gap)
        again = between_words(int(draw.integers(first + gap, last + 1)), first + gap, last)
        found += [Inserted(first, said), Inserted(again, asked)]
        room -= len(said) + len(asked)
    return found


def _record(name: str, value: str, draw: np.random.Generator) -> tuple[str, str]:
    """A record as it is said and as it comes again: one line twice, or two sentences."""
    if draw.random() < 0.5:
        line = f"\n{name}{JOINTS[int(draw.integers(len(JOINTS)))]}{value}\n"
        return line, line
    said, asked = (ways[int(draw.integers(len(ways)))] for ways in (SENTENCES, SENTENCES + QUESTIONS))
    return said.format(name=name, value=value), asked.format(name=name, value=value)


def put_in(row: np.ndarray, inserted: Sequence[Inserted]) -> np.ndarray:
    """``row`` [T] with all that is inserted; its last tokens fall off, so that it stays as long."""
    parts, end = [], 0
    for at, ids in sorted(inserted, key=lambda one: one.at):
        parts += [row[end:at], np.asarray(ids, dtype=row.dtype)]
        end = at
    return np.concatenate([*parts, row[end:]])[: len(row)]


def _outside(one: Inserted, taken: np.ndarray) -> Inserted:
    """Not inside a passage that comes again, but behind it."""
    at = one.at
    while 0 < at < len(taken) and taken[at] and taken[at - 1]:
        at += 1
    return Inserted(at, one.ids)


def items(dataset: PackedTokens | StreamedTokens) -> Iterable[dict]:
    """The items of either kind of data set, in its order; of a stream those of one epoch."""
    return iter(dataset) if isinstance(dataset, StreamedTokens) else (dataset[i] for i in range(len(dataset)))
