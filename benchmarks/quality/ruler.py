"""Four of RULER's tasks (arXiv 2404.06654), made offline in words of our own, scored by generation.

- ``single``: one number, under a name, in filler. The share of numbers found.
- ``multi``: the whole text is such lines, each another name and number; one is asked for.
- ``tracking``: five variables in filler, of which one is set to a number and each other to the one before; asked is
  which have that number. The share of the five that are named.
- ``words``: a numbered list in which ten names come thirty times each and all others three times, shuffled; asked is
  which ten come most often. The share of the ten that are named.

The last two show a short solved example first, as the paper's do. RULER itself has other words, essays as filler, and
several variants of each; so figures are to be compared with each other and not with the paper's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.quality.generated import Question, continuations
from lizard_models.evaluation.passkey import FILLER
from lizard_models.text.text_start import text_start

KINDS = ("single", "multi", "tracking", "words")
FIRST = (
    "amber ancient bitter bold brass bright broad brown calm clear cold copper crimson dark deep distant dry "
    "dusty early eastern empty faint fair fast flat foreign gentle golden grand grey hidden high hollow icy inner "
    "iron ivory large late little lonely long low lucky misty narrow new noble northern old open outer pale plain "
    "proud quick quiet red rough round royal rusty secret sharp short silent silver simple slow small soft solid "
    "southern steady steep still stormy strange strong sunny sweet tall tender thin tiny violet warm weary "
    "western white wide wild windy wise wooden"
).split()
SECOND = (
    "acorn anchor apple arrow barn basket beacon bell bench bird boat bottle branch bridge bucket candle canyon "
    "castle chair cherry cloud coin cottage cradle curtain desert door drum eagle engine falcon feather fence "
    "field flute forest fountain garden gate glove hammer harbour hill horn island kettle ladder lake lamp "
    "lantern leaf letter lion market meadow mirror mountain needle oak orchard otter owl paddle pebble pillow "
    "pine plough pocket pond quilt raven ribbon river rope saddle sail shell shore shovel sparrow spoon stone "
    "stove table tiger tower trumpet tunnel valley village wagon wall whistle willow window"
).split()
NUMBER = 7  # digits
COMMON, OFTEN, SELDOM = 10, 30, 3
LEAST = 4  # tokens of an entry of the list, at least: a digit, a point, two words
EXAMPLE_COMMON, EXAMPLE_OFTEN = 10, 3  # of the example, whose other names come once
CHAIN = 5
ROOM = {"single": 16, "multi": 16, "tracking": 32, "words": 96}  # tokens of an answer

RECORD = "The number of {name} is {number}.\n"
ASKED = "\nThe text above gives numbers under names. The number of {name} is"
VARIABLES = "\nQuestion: which variables have the value {value}, at once or through others? Answer: they are"
LIST = "Below is a numbered list. Some names in it come often, the others seldom.\n"
OFTENEST = "\nQuestion: which ten names come most often in the list? Answer: they are"


def questions(tokenizer: PreTrainedTokenizerBase, kind: str, length: int, count: int, seed: int = 0) -> list[Question]:
    """``count`` prompts of a kind, each at most ``length`` tokens with the room for its answer and what the tokenizer
    puts before a text, and nearly as many.

    They are the same for every model of one tokenizer. Raises ValueError for an unknown kind and a length that cannot
    hold the question.
    """
    if kind not in KINDS:
        raise ValueError(f"ruler: no kind {kind!r}; known are {', '.join(KINDS)}")
    make = _Maker(tokenizer, length, kind)
    return [getattr(make, kind)(np.random.default_rng((seed, length, zlib.crc32(kind.encode()), i)), (i + 0.5) / count)
            for i in range(count)]  # fmt: skip


def score(answer: str, wanted: Sequence[str]) -> float:
    """The share of what is wanted that the answer holds."""
    return sum(part in answer for part in wanted) / len(wanted)


def ruler_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    trials: int = 20,
    seed: int = 0,
    batch_tokens: int = 1 << 15,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """The mean of ``score`` over ``trials`` prompts, by kind and length. advance: called with the prompts done."""
    scores: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for length in lengths:
        for kind in KINDS:
            asked = questions(tokenizer, kind, length, trials, seed)
            answers = continuations(model, tokenizer, asked, batch_tokens)
            shares = [score(answer, question.wanted) for answer, question in zip(answers, asked, strict=True)]
            scores[kind][str(length)] = sum(shares) / trials
            advance(trials)
    return scores


class _Maker:
    """Prompts of one length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, kind: str) -> None:
        self.tokenizer, self.length, self.kind, self.room = tokenizer, length, kind, ROOM[kind]
        self.start = len(text_start(tokenizer))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def left(self, *parts: list[int]) -> int:
        """Tokens left beside these parts and the answer."""
        taken = self.start + sum(map(len, parts)) + self.room
        if taken >= self.length:
            raise ValueError(f"ruler: {self.kind} takes {taken} tokens without its text, more than {self.length}")
        return self.length - taken

    def question(self, prompt: list[int], wanted: list[str]) -> Question:
        return Question(prompt, wanted, self.room)

    def single(self, draw: np.random.Generator, depth: float) -> Question:
        name, number = next(_names(draw)), _number(draw)
        needle, end = self.encode(RECORD.format(name=name, number=number)), self.encode(ASKED.format(name=name))
        room = self.left(needle, end)
        filler = self._filler(room)
        before = round(depth * room)
        return self.question(filler[:before] + needle + filler[before:] + end, [number])

    def multi(self, draw: np.random.Generator, depth: float) -> Question:
        names = _names(draw)
        lines = [(name, _number(draw)) for name in islice(names, len(FIRST) * len(SECOND))]
        room = self.left(self.encode(ASKED.format(name=max(FIRST, key=len) + " " + max(SECOND, key=len))))
        body: list[list[int]] = []
        for name, number in lines:
            ids = self.encode(RECORD.format(name=name, number=number))
            room -= len(ids)
            if room < 0:
                break
            body.append(ids)
        name, number = lines[int(depth * len(body))]
        return self.question(list(chain.from_iterable(body)) + self.encode(ASKED.format(name=name)), [number])

    def tracking(self, draw: np.random.Generator, depth: float) -> Question:
        shown, _, _ = _chain(draw)
        example = self.encode(_solved(shown, draw))
        lines, wanted, value = _chain(draw)
        needles, end = [self.encode(line) for line in lines], self.encode(VARIABLES.format(value=value))
        room = self.left(example, *needles, end)
        filler = self._filler(room)
        cuts = [0, *sorted(int(cut) for cut in draw.integers(0, room + 1, CHAIN)), room]
        body = filler[: cuts[1]]
        for needle, start, stop in zip(needles, cuts[1:], cuts[2:], strict=False):
            body += needle + filler[start:stop]
        return self.question(example + body + end, wanted)

    def words(self, draw: np.random.Generator, depth: float) -> Question:
        names = list(_names(draw))
        shown, names = names[: 2 * EXAMPLE_COMMON], names[2 * EXAMPLE_COMMON :]
        listed = shown[:EXAMPLE_COMMON] * EXAMPLE_OFTEN + shown[EXAMPLE_COMMON:]
        listing = _listed(draw.permutation(listed).tolist())
        example = self.encode(f"{LIST}{listing}{OFTENEST} {', '.join(shown[:EXAMPLE_COMMON])}.\n\n")
        opening, end = self.encode(LIST), self.encode(OFTENEST)
        room = self.left(example, opening, end)
        most = max(1, room // (LEAST * SELDOM))  # names beside the common ones
        names = names[: COMMON + most]
        named = self.encode_all([f" {name}\n" for name in names])
        numbered = self.encode_all([f"{i}." for i in range(1, COMMON * OFTEN + SELDOM * len(names[COMMON:]) + 1)])
        sizes = np.array([len(ids) for ids in named])
        ends = np.cumsum([len(ids) for ids in numbered])[COMMON * OFTEN - 1 :: SELDOM]
        taken = OFTEN * sizes[:COMMON].sum() + np.cumsum([0, *(SELDOM * sizes[COMMON:])]) + ends
        fitting = int((taken <= room).sum()) - 1
        if fitting < 1:
            room = self.left(example, opening, end, [0] * int(taken[1]))
        entries = list(range(COMMON)) * OFTEN + list(range(COMMON, COMMON + fitting)) * SELDOM
        body = [numbered[i] + named[j] for i, j in enumerate(draw.permutation(entries).tolist())]
        return self.question(example + opening + list(chain.from_iterable(body)) + end, names[:COMMON])

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _filler(self, room: int) -> list[int]:
        once = self.encode(FILLER)
        return (once * (room // len(once) + 1))[:room]


def _names(draw: np.random.Generator) -> Iterator[str]:
    """All names of two words, in an order that is drawn."""
    for i in draw.permutation(len(FIRST) * len(SECOND)).tolist():
        yield f"{FIRST[i // len(SECOND)]} {SECOND[i % len(SECOND)]}"


def _number(draw: np.random.Generator) -> str:
    return str(int(draw.integers(10 ** (NUMBER - 1), 10**NUMBER)))


def _chain(draw: np.random.Generator) -> tuple[list[str], list[str], str]:
    """The lines of a chain of variables, their names, and the value."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) < CHAIN:
        name = "".join(letters[i] for i in draw.integers(0, len(letters), 5))
        names += [name] if name not in names else []
    value = str(int(draw.integers(10_000, 100_000)))
    first = f"Set {names[0]} = {value}. "
    return [first, *(f"Set {b} = {a}. " for a, b in zip(names, names[1:], strict=False))], names, value


def _solved(lines: list[str], draw: np.random.Generator) -> str:
    names = [line.split()[1] for line in lines]
    value = lines[0].split("= ")[1].rstrip(". ")
    return f"{FILLER}{FILLER.join(lines)}{VARIABLES.format(value=value)} {', '.join(names)}.\n\n"


def _listed(names: list[str]) -> str:
    return "".join(f"{i}. {name}\n" for i, name in enumerate(names, 1))
