"""Ids that come in pieces: where they are cut, what stands between documents, and what is left as it was."""

import numpy as np
import pytest
import torch
from readable import SENTENCE, byte_tokenizer
from tiny import student, tokens

from lizard_models.text.prompts import prefill, prompt_tokens, read_to_the_end
from lizard_models.text.sequences import PackedTokens, _Encoder, load_documents
from lizard_models.text.token_stream import stream_tokens, token_chunks, tokenise_pieces


@pytest.mark.parametrize("sizes", [(10,), (1,) * 10, (3, 7), (9, 1)])
def test_chunks_share_their_overlap_and_the_last_is_more_than_it(sizes):
    pieces = np.split(np.arange(10), np.cumsum(sizes)[:-1])
    assert [c.tolist() for c in token_chunks(pieces, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [c.tolist() for c in token_chunks(pieces, 4, 1)] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9]]
    assert [c.tolist() for c in token_chunks(pieces, 3, 1)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_documents_of_a_stream_are_ended_and_ids_are_taken_as_they_are(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text("the mill")
    (tmp_path / "b.txt").write_text("a river")
    np.save(tmp_path / "c.npy", np.arange(5, dtype=np.uint16))
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the mill", "a river")]
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.npy")]
    assert tokenizer.eos_token_id is not None
    found = np.concatenate(list(stream_tokens(files, tokenizer, piece=3))).tolist()
    assert found == [*texts[0], tokenizer.eos_token_id, *texts[1], *range(5)]
    assert np.concatenate(list(stream_tokens(files[2:], piece=2))).tolist() == list(range(5))
    (tmp_path / "d.jsonl").write_text('{"text": "the mill"}\n')
    assert np.concatenate(list(stream_tokens([str(tmp_path / "d.jsonl")], tokenizer))).tolist() == texts[0]
    with pytest.raises(ValueError, match="holds text, but the model has no tokenizer"):
        list(stream_tokens(files[:1]))
    with pytest.raises(ValueError, match="token ids run from 0 to 4, but the vocabulary has 4"):
        list(stream_tokens(files[2:], vocab_size=4))


def test_no_piece_of_a_text_is_empty():
    pieces = [SENTENCE.format(n=n)[i : i + 1] for n in range(3) for i in range(len(SENTENCE))]
    assert all(len(ids) for ids in tokenise_pieces(pieces, byte_tokenizer()))


@torch.no_grad()
def test_reading_to_the_end_leaves_the_prompt_as_it_was():
    model, row = student(), tokens(1, 11)[0]
    prompt = prefill(model, [row.numpy()])
    whole = read_to_the_end(model, prompt)
    assert (prompt.cache.get_seq_length(), whole.get_seq_length()) == (10, 11)


def test_what_a_tokenizer_puts_before_a_text_comes_once_and_not_where_it_goes_on():
    begins = byte_tokenizer(around="<s> $A")
    ids = byte_tokenizer()("the mill")["input_ids"]
    for goes_on, start in ((False, [1]), (True, [])):
        found = np.concatenate(list(prompt_tokens(["the ", "mill"], begins, goes_on=goes_on)))
        assert found.tolist() == start + ids


def test_texts_are_tokenised_as_soon_as_enough_are_there():
    read = []

    def documents():
        for text in ("ab", "cde", "f", "ghij"):
            read.append(text)
            yield text

    found = _Encoder(byte_tokenizer(), None)(documents(), at_once=5)
    next(found)
    assert read == ["ab", "cde"] and len(list(found)) == 3


def test_packed_rows_are_shuffled_by_seed_0_unless_another_is_given():
    ids = np.arange(40)
    rows = [[item["input_ids"].tolist() for item in PackedTokens(ids, 2, **seed)] for seed in ({}, {"seed": 0})]
    assert rows[0] == rows[1]


def test_a_file_without_text_has_no_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="the longest document has 0 tokens, fewer than 4"):
        load_documents([str(tmp_path / "a.jsonl")], byte_tokenizer(), 4)
