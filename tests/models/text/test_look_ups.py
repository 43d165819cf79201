"""Rows in which something is asked for again: exact lengths, the same for one seed, and what is asked stands before."""

import re

import numpy as np
import pytest
import torch
from readable import byte_tokenizer

from lizard_models.text.look_ups import (
    JOINTS,
    QUESTIONS,
    SENTENCES,
    Inserted,
    _outside,
    look_up_rows,
    passages,
    put_in,
    records,
)
from lizard_models.text.sequences import PackedTokens, StreamedTokens

TOKENIZER = byte_tokenizer()
WORDS = "river wind mill road field stone cart house winter summer evening garden bridge market".split()


def prose(characters: int, seed: int = 0) -> str:
    """Words in an order that does not repeat itself."""
    draw = np.random.default_rng(seed)
    text = ""
    while len(text) < characters:
        text += " ".join(draw.choice(WORDS, 9)) + f" {draw.integers(10**6)}. "
    return text[:characters]


def packed(rows: int = 6, length: int = 512) -> PackedTokens:
    return PackedTokens(np.array(TOKENIZER(prose(rows * length))["input_ids"]), length)


def told_by(record: str) -> tuple[str, str]:
    """Name and value of a line or a sentence."""
    if record[0] == "\n":
        name, value = next(record.strip().split(joint) for joint in JOINTS if joint in record)
        return name, value
    ways = [re.escape(way).replace(r"\{name\}", "(?P<name>.+)").replace(r"\{value\}", "(?P<value>.+)")
            for way in QUESTIONS + SENTENCES]  # fmt: skip
    found = next(match for match in (re.fullmatch(way, record) for way in ways) if match)
    return found["name"], found["value"]


def texts(rows: PackedTokens) -> list[str]:
    return [TOKENIZER.decode(row) for row in rows.sequences]


def test_every_second_row_is_as_it_was_and_all_are_as_long():
    data = packed()
    rows = look_up_rows(data, TOKENIZER, 12, gap=64)
    assert rows.sequences.shape == (12, 512)
    given = [data[i]["input_ids"].numpy() for i in range(6)]
    for i, row in enumerate(rows.sequences):
        assert np.array_equal(row, given[i % 6]) == (i % 2 == 0)
    assert len({row.tobytes() for row in rows.sequences[1::2]}) == 6  # a row that comes again asks for other things
    item = rows[0]["input_ids"]
    assert item.dtype == torch.int64 and item.shape == (512,)


def test_something_comes_again_in_every_row_if_asked():
    data = packed()
    rows = look_up_rows(data, TOKENIZER, 12, gap=64, in_all=True)
    given = [data[i]["input_ids"].numpy() for i in range(6)]
    assert not any(np.array_equal(row, given[i % 6]) for i, row in enumerate(rows.sequences))
    marks = ("\n", "Note", "She wrote", "Of the", "Ask for", " is the ", " is ")  # of records; prose has none
    told = [any(mark in text for mark in marks) for text in texts(rows)]
    assert told == [False, True] * 6  # passages, records


def test_rows_follow_the_seed_alone():
    data = packed()
    rows = look_up_rows(data, TOKENIZER, 8, gap=64)
    again = look_up_rows(data, TOKENIZER, 8, gap=64)
    assert rows.digest == again.digest and torch.equal(rows[3]["input_ids"], again[3]["input_ids"])
    more, other = look_up_rows(data, TOKENIZER, 12, gap=64), look_up_rows(data, TOKENIZER, 8, gap=64, seed=1)
    assert np.array_equal(more.sequences[:4], rows.sequences[:4])
    assert other.digest != rows.digest and not np.array_equal(other.sequences[1], rows.sequences[1])


@pytest.mark.parametrize("gap", [0, 64, 256])
def test_records_come_twice_and_are_made_of_the_rows_own_words(gap):
    data, kinds = packed(), set()
    for seed in range(20):
        row = data[seed % 6]["input_ids"].numpy()
        found = records(row, TOKENIZER, gap, np.random.default_rng(seed))
        assert found and sum(len(ids) for _, ids in found) <= 128
        made = put_in(row, found)
        text, before = TOKENIZER.decode(made), TOKENIZER.decode(row)
        assert len(made) == len(row)
        for one, same in zip(found[::2], found[1::2], strict=True):
            assert same.at - one.at >= gap
            said, asked = TOKENIZER.decode(one.ids), TOKENIZER.decode(same.ids)
            first = text.index(said)
            second = text.index(asked, first + 1)
            assert second - first - len(said) >= gap
            assert one.at == 0 or before[one.at].isspace()
            if not before[same.at].isspace():  # no place between two words was near
                near = range(max(one.at + gap, same.at - 32), min(same.at + 32, 384) + 1)
                assert not any(before[i].isspace() for i in near)
            name, value = told_by(said)
            assert told_by(asked) == (name, value) and (said[0] != "\n" or asked == said)
            kinds.add(said[0])
            assert all(word in before for word in name.split())
            assert value.isdigit() and 4 <= len(value) <= 8 or all(word in before for word in value.split())
    assert kinds == {"\n", " "}  # lines of a list and sentences


@pytest.mark.parametrize("gap", [0, 64, 256])
def test_passages_come_again_word_for_word_behind_the_gap(gap):
    data = packed()
    number = 0
    for seed in range(20):
        row = data[seed % 6]["input_ids"].numpy()
        found = passages(row, gap, np.random.default_rng(seed))
        number += len(found)
        made = put_in(row, found)
        assert len(made) == len(row) and sum(len(ids) for _, ids in found) <= 128
        held = made.tolist()
        for _, ids in found:
            assert 16 <= len(ids) <= 128
            starts = [i for i in range(len(held) - len(ids) + 1) if held[i : i + len(ids)] == ids]
            assert len(starts) == 2 and starts[1] - starts[0] - len(ids) >= gap
    assert number >= 20


def test_without_words_or_tokenizer_passages_stand_in():
    ids = np.arange(4 * 512) + 300
    rows = look_up_rows(PackedTokens(ids, 512), None, 4, gap=64).sequences
    for row in rows[1::2]:
        assert len(set(row.tolist())) < 512 - 15  # at least one passage of 16 comes again
    for row in rows[::2]:
        assert len(set(row.tolist())) == 512
    digits = np.array(TOKENIZER("".join(map(str, range(2000))))["input_ids"])
    for row in look_up_rows(PackedTokens(digits, 512), TOKENIZER, 4, gap=64).sequences[1::2]:
        assert TOKENIZER.decode(row).isdigit()


def test_a_stream_gives_its_first_rows():
    ids = np.array(TOKENIZER(prose(8 * 512))["input_ids"])
    stream = StreamedTokens(lambda epoch: iter([ids]), 512)
    first = [item["input_ids"].numpy() for item, _ in zip(stream, range(4), strict=False)]
    rows = look_up_rows(stream, TOKENIZER, 4, gap=64).sequences
    assert np.array_equal(rows[0], first[0]) and np.array_equal(rows[2], first[2])


def test_nothing_put_in_changes_nothing():
    row = np.arange(9)
    assert np.array_equal(put_in(row, []), row)
    assert put_in(row, [Inserted(7, [20]), Inserted(0, [30, 31])]).tolist() == [30, 31, 0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(count=0), "count must be at least 1"),
        (dict(count=2, gap=-1), "gap at least 0, got 2 and -1"),
        (dict(count=2, gap=257), "rows of 512 tokens are too short for gap=257: wanted at least 514"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        look_up_rows(packed(), TOKENIZER, **options)
    with pytest.raises(ValueError, match="rows of 127 tokens are too short for gap=0: wanted at least 128"):
        look_up_rows(packed(2, 127), TOKENIZER, 2, gap=0)
    with pytest.raises(ValueError, match="the data set gave no row"):
        look_up_rows(StreamedTokens(lambda epoch: [], 512), TOKENIZER, 2)


def test_one_row_is_enough():
    rows = look_up_rows(packed(rows=1), TOKENIZER, 3, gap=64)
    assert rows.sequences.shape == (3, 512) and np.array_equal(rows.sequences[0], rows.sequences[2])


def test_what_falls_into_a_passage_goes_behind_it():
    taken = np.array([False, False, True, True, True, False])
    assert [_outside(Inserted(at, [9]), taken).at for at in range(6)] == [0, 1, 2, 5, 5, 5]
