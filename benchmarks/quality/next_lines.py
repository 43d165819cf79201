"""The next line of held-out source, by generation: the same lines after more and more of the text before them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from benchmarks.quality.generated import Question, continuations
from lizard_models.text.text_start import text_start

LEAST = 12  # characters of a line that is asked for, white space at its ends not counted
CHARACTERS = 8  # a token at most, of the text that is tokenised before a line
TRIES = 200  # lines drawn for each that is taken


def read_projects(path: Path) -> list[str]:
    """Texts of the projects in a ``held_out.jsonl`` of ``code-data``: their files in order, each after its name.

    Raises ValueError for a file that is none.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        texts: dict[str, list[str]] = {}
        for record in records:
            head = f"# {record['project']}/{record['path']}\n"
            texts.setdefault(record["project"], []).append(f"{head}{record['text']}\n")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"source: {str(path)!r} is not a held_out.jsonl of code-data: {error}") from error
    return ["".join(parts) for _, parts in sorted(texts.items())]


def next_line_questions(
    tokenizer: PreTrainedTokenizerBase, projects: Sequence[str], lengths: Sequence[int], count: int, seed: int = 0
) -> dict[int, list[Question]]:
    """The same ``count`` lines of ``projects`` by length: prompts are the last ``length`` tokens before a line, with
    what the tokenizer puts before a text.

    A line has at least twelve characters, is not the same as one of the fifty before it, and follows at least as much
    text as the longest prompt takes. Raises ValueError if the projects have too few such lines.
    """
    longest, draw, begun = max(lengths), np.random.default_rng(seed), len(text_start(tokenizer))
    found: dict[int, list[Question]] = {length: [] for length in lengths}
    starts = [np.cumsum([0, *(len(line) + 1 for line in text.split("\n")[:-1])]) for text in projects]
    sizes = np.array([len(text) for text in projects], float)
    taken: set[tuple[int, int]] = set()
    for _ in range(TRIES * count):
        if len(taken) == count:
            break
        project = int(draw.choice(len(projects), p=sizes / sizes.sum()))
        at = int(draw.integers(len(starts[project])))
        text, start = projects[project], int(starts[project][at])
        line = text[start:].partition("\n")[0].strip()
        before = text[max(0, start - longest * CHARACTERS) : start]
        if (
            len(before.encode()) < longest
            or len(line) < LEAST
            or (project, at) in taken
            or line in [x.strip() for x in before.split("\n")[-51:]]
        ):
            continue
        ids = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < longest:
            continue
        taken.add((project, at))
        room = len(tokenizer(text[start:].partition("\n")[0] + "\n", add_special_tokens=False)["input_ids"]) + 4
        for length in lengths:
            found[length].append(Question(ids[begun - length :], [line], room))
    if len(taken) < count:
        raise ValueError(f"source: {len(taken)} lines follow {longest} tokens of one project, wanted {count}")
    return found


def next_line_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    projects: Sequence[str],
    lengths: Sequence[int],
    *,
    trials: int = 100,
    seed: int = 0,
    batch_tokens: int = 1 << 15,
) -> dict[str, float]:
    """Share of lines of which the first generated line is the same, white space at its ends aside, by length."""
    scores = {}
    for length, asked in next_line_questions(tokenizer, projects, lengths, trials, seed).items():
        answers = continuations(model, tokenizer, asked, batch_tokens)
        right = [a.partition("\n")[0].strip() == q.wanted[0] for a, q in zip(answers, asked, strict=True)]
        scores[str(length)] = sum(right) / trials
    return scores
