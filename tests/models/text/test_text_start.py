"""Where a tokenizer puts the beginning of a text, every text that a model reads has it there, once."""

import json

import numpy as np
import pytest
import torch
from readable import byte_tokenizer

from lizard_models.evaluation.passkey import (
    passkey_examples,
    passkey_prompt,
    several_passkeys_prompt,
    shortest_length,
)
from lizard_models.text import sequences as data
from lizard_models.text.prompts import prompt_tokens
from lizard_models.text.sequences import load_documents, load_sequences, stream_digest
from lizard_models.text.text_start import text_start
from lizard_models.text.token_stream import stream_tokens

PLAIN, BEGINS = byte_tokenizer(), byte_tokenizer(around="<s> $A")
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_what_stands_before_a_text_is_told_from_what_stands_after():
    assert text_start(PLAIN) == text_start(byte_tokenizer(around="$A </s>")) == []
    assert text_start(BEGINS) == text_start(byte_tokenizer(around="<s> $A </s>")) == [1]
    assert text_start(byte_tokenizer(around="</s> <s> $A <pad>")) == [2, 1]

    def strange(text, add_special_tokens):
        return {"input_ids": [1, 8] if add_special_tokens else [9]}

    with pytest.raises(ValueError, match=r"'a' is \[9\] without special tokens and \[1, 8\] with them"):
        text_start(strange)


def text_of(sequences) -> str:
    ids = sequences.sequences.flatten() if hasattr(sequences, "sequences") else [i["input_ids"] for i in sequences]
    return PLAIN.decode(np.ravel([np.asarray(row) for row in ids]))


def test_documents_of_text_begin_and_end(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "Hi"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in ({"text": "abc"}, {"messages": turns}, {"input_ids": [70]})))
    plain, begun = "### User:\nHi</s>", f"<s>abc</s><s>### User:\nHi</s>{PLAIN.decode([70])}"
    assert text_of(load_sequences([str(path)], PLAIN, 1)) == f"abc</s>{plain}{PLAIN.decode([70])}"
    assert text_of(load_sequences([str(path)], BEGINS, 1)) == begun
    streamed = np.concatenate([*stream_tokens([str(path)], BEGINS)])
    assert PLAIN.decode(streamed) == "<s>abc</s><s>### User:\nHi" + PLAIN.decode([70])
    templated = byte_tokenizer(around="<s> $A")
    templated.chat_template = TEMPLATE  # which writes the beginning itself
    assert text_of(load_sequences([str(path)], templated, 1)).startswith("<s>abc</s><s><user>Hi</s>")
    assert PLAIN.decode(np.concatenate([*stream_tokens([str(path)], templated)])).startswith("<s>abc</s><s><user>Hi")
    assert PLAIN.decode(np.concatenate([*prompt_tokens(["ab"], BEGINS)])) == "<s>ab"
    assert PLAIN.decode(np.concatenate([*prompt_tokens(["ab"], byte_tokenizer(around="<s> $A </s>"))])) == "<s>ab"
    monkeypatch.setattr(data, "STREAM_FROM_BYTES", 1)
    assert text_of(load_sequences([str(path)], BEGINS, 1).__class__(
        load_sequences([str(path)], BEGINS, 1).documents, 1, buffer=1)) == begun  # fmt: skip


def test_tokens_of_before_texts_began_are_not_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "KEPT_FROM_BYTES", 1)
    (tmp_path / "a.txt").write_text("abc")
    source, cache = [str(tmp_path / "a.txt")], tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(data, "text_start", lambda tokenizer: [])
        assert text_of(load_sequences(source, BEGINS, 1, cache=cache)) == "abc</s>"
        before = stream_digest([tmp_path / "a.txt"], [], BEGINS, None)
        same = stream_digest([tmp_path / "a.txt"], [], PLAIN, None)
    assert text_of(load_sequences(source, BEGINS, 1, cache=cache)) == "<s>abc</s>"
    assert stream_digest([tmp_path / "a.txt"], [], BEGINS, None) != before
    assert stream_digest([tmp_path / "a.txt"], [], PLAIN, None) == same


def test_every_part_of_a_document_begins(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz"
    (tmp_path / "a.txt").write_text(letters)
    np.save(tmp_path / "b.npy", BEGINS(letters)["input_ids"])
    np.save(tmp_path / "c.npy", PLAIN(letters)["input_ids"])

    def rows(name, tokenizer):
        return PLAIN.batch_decode(load_documents([str(tmp_path / name)], tokenizer, 9, count=3).tokens)

    assert rows("a.txt", BEGINS) == rows("b.npy", BEGINS) == ["<s>abcdefgh", "<s>ijklmnop", "<s>qrstuvwx"]
    assert rows("a.txt", PLAIN) == rows("c.npy", BEGINS) == ["abcdefghi", "jklmnopqr"]


def test_passkeys_begin_and_are_as_long_as_asked():
    for keys, make, more in ((1, passkey_prompt, (0.3, "12345")), (5, several_passkeys_prompt, (["123456"] * 5, 2))):
        least = shortest_length(BEGINS, keys)
        assert least == shortest_length(PLAIN, keys) + 1
        prompt, answer = make(BEGINS, least + 50, *more)
        assert prompt == [1, *make(PLAIN, least + 49, *more)[0]] and len(prompt) + len(answer) == least + 50
        assert {len(p) + len(a) for p, a in passkey_examples(BEGINS, least, 4, keys=keys)} == {least}
    novel = torch.tensor([BEGINS("x" * 400)["input_ids"]])
    (prompt, answer), _ = passkey_examples(BEGINS, 420, 2, texts=novel)
    assert prompt.count(1) == 1 and prompt[0] == 1 and len(prompt) + len(answer) == 420
    with pytest.raises(ValueError, match="takes 401 tokens of text around the key, got 400"):
        passkey_prompt(BEGINS, shortest_length(BEGINS, 1) + 401, 0.5, "12345", novel[0].tolist())
