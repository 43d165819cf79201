"""Data: every format, packing, order, and what is said when a source is wrong."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from readable import byte_tokenizer, save_texts

from lizard_models.text import documents
from lizard_models.text import sequences as data
from lizard_models.text.documents import format_instruction
from lizard_models.text.sequences import PackedTokens, StreamedTokens, load_documents, load_sequences

TOKENIZER = byte_tokenizer()


def written(sequences) -> str:
    """All the text of some sequences, in their order before the shuffle."""
    return TOKENIZER.decode(sequences.sequences.flatten())


def test_every_format_gives_the_same_tokens(tmp_path):
    texts = [f"document {n} says something. " * 5 for n in range(4)]
    records = [{"text": text} for text in texts]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "c.parquet")
    ids = [TOKENIZER(text)["input_ids"] + [2] for text in texts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"input_ids": row} for row in ids]), tmp_path / "d.parquet")
    np.save(tmp_path / "e.npy", np.concatenate(ids).astype(np.uint16))
    (tmp_path / "f").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "f" / f"{n}.txt").write_text(text)
    loaded = [load_sequences([str(tmp_path / name)], TOKENIZER, 32) for name in ("a.json", "b.jsonl", "c.parquet")]
    loaded += [load_sequences([str(tmp_path / name)], None, 32, vocab_size=259) for name in ("d.parquet", "e.npy")]
    assert len({one.digest for one in loaded}) == 1 and len(loaded[0]) == sum(map(len, ids)) // 32
    folder = load_sequences([str(tmp_path / "f")], TOKENIZER, 32)  # a folder's files are shuffled
    *whole, rest = written(folder).split("</s>")
    assert len(folder) == len(loaded[0]) and sorted(whole) == texts and not rest  # 544 tokens, 17 times 32


def test_packing_ends_documents_and_drops_the_rest(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "defg"}\n')
    packed = load_sequences([str(tmp_path / "a.jsonl")], TOKENIZER, 4)
    assert written(packed) == "abc</s>defg"
    assert packed.sequences.dtype == np.uint16 and packed[0]["input_ids"].dtype == torch.int64


def test_instruction_records_become_one_text(tmp_path):
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert format_instruction(**{"instruction": "Hi", "context": "", "output": "Hello"}).count("###") == 2
    (tmp_path / "a.json").write_text(json.dumps([record] * 3))
    text = written(load_sequences([str(tmp_path / "a.json")], TOKENIZER, 16))
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3</s>" in text


def test_conversations_are_written_in_the_models_template(tmp_path):
    turns = [("user", "Hi"), ("assistant", "Hello")]
    records = [
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"conversations": [{"from": name, "value": text} for name, text in [("human", "Hi"), ("gpt", "Hello")]]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plain = written(load_sequences([str(tmp_path / "a.jsonl")], TOKENIZER, 1))
    assert plain == "### User:\nHi\n\n### Assistant:\nHello</s>" * 4
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    templated = written(load_sequences([str(tmp_path / "a.jsonl")], tokenizer, 1))
    assert templated == "<user>Hi<assistant>Hello</s>" * 4
    (tmp_path / "b.jsonl").write_text('{"messages": [{"who": "me"}]}\n')
    with pytest.raises(ValueError, match="turn of a conversation in .* has the fields who; wanted role and content"):
        load_sequences([str(tmp_path / "b.jsonl")], TOKENIZER, 1)


def test_a_text_field_and_a_number_of_examples_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "abcabc", "text": "x"}\n{"body": "de", "text": "y"}\n')
    packed = load_sequences([str(tmp_path / "a.jsonl")], TOKENIZER, 3, text_field="body", examples=1)
    assert written(packed) == "abcabc"


def test_order_follows_the_seed():
    tokens = np.arange(400)
    orders = [[int(item["input_ids"][0]) for item in PackedTokens(tokens, 4, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) == list(range(0, 400, 4))


def test_streamed_sequences_are_the_packed_ones(tmp_path, monkeypatch):
    folder = save_texts(tmp_path / "texts")
    packed = load_sequences([str(folder)], TOKENIZER, 64)
    monkeypatch.setattr(data, "STREAM_FROM_BYTES", 0)
    streamed = load_sequences([str(folder)], TOKENIZER, 64)
    assert isinstance(streamed, StreamedTokens)
    first, again = ([item["input_ids"] for item in streamed] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    streamed.set_epoch(1)
    assert not all(torch.equal(a["input_ids"], b) for a, b in zip(streamed, first, strict=True))
    rows = {tuple(row) for row in packed.sequences.tolist()}
    assert len(first) == len(packed) and {tuple(row.tolist()) for row in first} == rows


def test_a_small_shuffle_buffer_loses_nothing():
    stream = StreamedTokens(lambda epoch: [np.arange(i, i + 10) for i in range(0, 1000, 10)], 5, buffer=7)
    starts = [int(item["input_ids"][0]) for item in stream]
    assert starts != sorted(starts) and sorted(starts) == list(range(0, 1000, 5))


def test_unusable_sources_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "hub_answers", lambda path="": False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.jsonl").write_text('{"a": 1}\n')
    np.save(tmp_path / "big.npy", np.array([1, 300]))
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    for source, reason in {
        "missing.txt": "'missing.txt' does not exist",
        "./missing": "does not exist",
        "missing/": "does not exist",
        "owner/missing": "the hub does not answer",
        str(tmp_path / "empty"): "holds none of .txt, .json",
        str(tmp_path / "a.csv"): "ends in '.csv'",
        str(tmp_path / "short.txt"): "4 tokens are fewer than one sequence of seq_len=8; .* a smaller seq_len",
        str(tmp_path / "bad.json"): "is not valid json",
        str(tmp_path / "odd.jsonl"): "has the fields a; wanted text, messages, instruction and output, prompt and ",
        str(tmp_path / "big.npy"): "token ids run from 1 to 300, but the vocabulary has 259",
        str(tmp_path / "float.npy"): r"holds float64 \[3\], wanted integer ids",
        str(tmp_path / "object.npy"): "is not an array of token ids",
    }.items():
        with pytest.raises(ValueError, match=reason):
            load_sequences([source], TOKENIZER, 8)
    with pytest.raises(ValueError, match="no source"):
        load_sequences([], TOKENIZER, 8)
    with pytest.raises(ValueError, match="no tokenizer"):
        load_sequences([str(tmp_path / "short.txt")], None, 2)
    with pytest.raises(ValueError, match="wanted body"):
        load_sequences([str(tmp_path / "odd.jsonl")], TOKENIZER, 2, text_field="body")


def test_a_hub_data_set_is_streamed(monkeypatch):
    monkeypatch.setattr(documents, "hub_answers", lambda path="": True)
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"text": "abcdefg"}, {"text": "hi"}])

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    streamed = load_sequences(["owner/name:part"], TOKENIZER, 4)
    assert len(list(streamed)) == 2
    assert asked[0] == (("owner/name", "part"), {"split": "train", "streaming": True})
    some = load_sequences(["owner/name:part"], TOKENIZER, 4, examples=1)
    assert written(some) == "abcdefg</s>"  # a number of examples has a length, so that epochs can be counted
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ValueError, match="'owner/name'.*division by zero"):
        load_sequences(["owner/name"], TOKENIZER, 4)


def test_documents_come_one_window_each_then_the_next(tmp_path):
    for name, text in {"a": "a" * 25, "b": "b" * 12, "c": "c" * 5}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    chosen = load_documents([str(tmp_path)], TOKENIZER, 10, count=3)
    assert [TOKENIZER.decode(row)[0] for row in chosen.tokens] == ["a", "b", "a"]
    assert load_documents([str(tmp_path)], TOKENIZER, 10, count=2).tokens.shape == (2, 10)
    assert load_documents([str(tmp_path)], TOKENIZER, 10, count=3).digest == chosen.digest
    with pytest.raises(ValueError, match="longest document has 25 tokens, fewer than 26"):
        load_documents([str(tmp_path)], TOKENIZER, 26)


def test_documents_may_be_rows_of_ids(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(60, dtype=np.uint16).reshape(3, 20))
    chosen = load_documents([str(tmp_path / "a.npy")], None, 20, count=2, vocab_size=60)
    assert chosen.tokens[:, 0].tolist() == [0, 20]
