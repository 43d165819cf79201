"""Rows of stage 0, made of the user's text: with things to look up, and some of the text held out to measure on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lizard_models.distill.arguments import total_steps
from lizard_models.distill.parallel import process_count
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.recipes import Stage0Config
from lizard_models.teachers.find import Teacher
from lizard_models.text.look_ups import items, look_up_rows
from lizard_models.text.mixture import MixedTokens, load_mixture
from lizard_models.text.sequences import PackedTokens, StreamedTokens, TooLittleText

HELD_OUT = 8  # rows on which R2 is measured
ASKED = 4  # rows by which places are shared out
PART = 4  # at most one row of the text in four is held out for them
GAP = 256  # tokens at least between a thing and the place where it is asked for, in rows of four times as many


class ScoreRows(NamedTuple):
    """What stage 0 of a run reads."""

    recipe: Stage0Config  # with the steps that ``training`` gives in one pass
    training: PackedTokens
    held_out: Tensor  # [N, T] int64, of other parts of the text
    asked: Tensor  # [ASKED, T] int64, of these parts too, with something to look up in each
    told: str  # how many rows of what, for people

    def micro_batch_size(self, wanted: int | None) -> int | None:
        """The largest number of rows up to ``wanted`` that divides a process's part of a batch; None for no limit."""
        if wanted is None:
            return None
        share = max(1, self.recipe.batch_size // process_count())
        return next(size for size in range(min(wanted, share), 0, -1) if share % size == 0)


def score_rows(
    sources: Sequence[str],
    teacher: Teacher,
    model: LizardCausalLM,
    recipe: Stage0Config,
    weights: Sequence[float] = (),
    **settings: Any,
) -> ScoreRows:
    """Rows of ``recipe.sequence_length`` tokens by ``text.look_ups.look_up_rows``, as many as the recipe's steps take.

    sources, weights, settings: as ``load_mixture`` takes them; what comes again by its weight is taken
    once. model: the student, whose windows say which keys can be learned from. With ``epochs`` the text gives as many
    rows as it has times that, with ``max_steps`` as many as these take. Of a text with fewer rows each comes again,
    with other things asked for in it.

    Raises ValueError, before anything is trained, for rows too short for a key to count, a text of fewer than two
    rows, a batch that the processes cannot share, and what ``load_mixture`` does.
    """
    length = recipe.sequence_length
    least = check_length(model, recipe)
    if recipe.batch_size % process_count():
        raise ValueError(
            f"stage0.batch_size={recipe.batch_size} must be a multiple of the {process_count()} processes that share it"
        )
    try:
        sequences = load_mixture(
            sources,
            weights,
            teacher.tokenizer,
            length,
            seed=recipe.seed,
            examples=recipe.examples,
            vocab_size=teacher.model.config.vocab_size,
            **settings,
        )
    except TooLittleText as error:
        raise too_short(f"{error.tokens} tokens give none", recipe, least) from None
    if isinstance(sequences, MixedTokens):
        sequences = sequences.once()  # or a row could be held out and trained on
    wanted = None if recipe.max_steps is None else recipe.max_steps * recipe.batch_size + HELD_OUT
    if wanted is None and isinstance(sequences, StreamedTokens):
        raise ValueError("stage0.max_steps must be given: the data are streamed, so an epoch has no known length")
    found = [item["input_ids"].numpy() for item in islice(items(sequences), wanted)]
    if len(found) < 2:
        raise too_short(f"the text gives {len(found)}", recipe, least)
    apart = max(1, min(HELD_OUT, len(found) // PART))
    held_out, text = (PackedTokens(np.concatenate(part), length) for part in (found[:apart], found[apart:]))
    steps = total_steps(recipe, text)
    gap, count = min(GAP, length // 4), steps * recipe.batch_size
    training = look_up_rows(text, teacher.tokenizer, count, gap=gap, seed=recipe.seed)
    measured = look_up_rows(held_out, teacher.tokenizer, HELD_OUT, gap=gap, seed=recipe.seed + 1)
    asked = look_up_rows(held_out, teacher.tokenizer, ASKED, gap=gap, seed=recipe.seed + 2, in_all=True)
    return ScoreRows(
        dataclasses.replace(recipe, epochs=None, max_steps=steps),
        training,
        all_rows(measured),
        all_rows(asked),
        f"{count} rows of {length} tokens with things to look up, of {len(text)} rows of the text; {apart} held out",
    )


def all_rows(rows: PackedTokens) -> Tensor:
    """[N, T] ids, in the order of the data set."""
    return torch.stack([rows[i]["input_ids"] for i in range(len(rows))])


def check_length(model: LizardCausalLM, recipe: Stage0Config) -> int:
    """The shortest rows in which some key of every layer counts. Raises ValueError if the recipe's are shorter."""
    configs = [attention.lizard.config for attention in model.lizard_attentions()]
    widest = max(config.window + config.anchors for config in configs)
    if recipe.sequence_length < widest + recipe.label_queries:
        raise ValueError(
            f"stage0.sequence_length={recipe.sequence_length} is too short: a key counts that has left the window "
            f"(with anchors {widest} tokens) and has stage0.label_queries={recipe.label_queries} later queries; wanted "
            f"at least {widest + recipe.label_queries}, or fewer label_queries"
        )
    return widest + recipe.label_queries


def too_short(what: str, recipe: Stage0Config, least: int) -> ValueError:
    """The error for a text of fewer than two rows."""
    return ValueError(
        f"data: stage 0 takes at least 2 rows of stage0.sequence_length={recipe.sequence_length} tokens, one of them "
        f"held out, and {what}: give more text, or a shorter stage0.sequence_length (at least {least}: window, anchors "
        f"and stage0.label_queries={recipe.label_queries}), or leave stage 0 out (no steps of it), by which the keys "
        "least like the mean key are kept, or take preset plain, which keeps none"
    )
