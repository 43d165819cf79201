"""What is no text is refused by file and line, what is hidden is not read, what stands twice is told."""

import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from cli_calls import call, error
from readable import SENTENCE, byte_tokenizer, save_teacher, save_texts
from tiny import tokens

from lizard_models.text import overlap as overlapping
from lizard_models.text.decoding import argument_text, check_encoding, text_pieces
from lizard_models.text.documents import files_left_out, find_sources, read_file
from lizard_models.text.overlap import RUN, overlap
from lizard_models.text.sequences import PackedTokens, load_documents, load_sequences
from lizard_models.text.token_stream import stream_tokens

TOKENIZER = byte_tokenizer()
WORDS = "eins\nzwei\nGrüße\nvier\n"


def refusals(source, **options) -> set[str]:
    """What the three readers say of a source."""
    said = set()
    for read in (load_sequences, load_documents):
        with pytest.raises(ValueError) as raised:
            read([str(source)], TOKENIZER, 4, **options)
        said.add(str(raised.value))
    with pytest.raises(ValueError) as raised:
        list(stream_tokens([str(source)], TOKENIZER, **options))
    return said | {str(raised.value)}


@pytest.mark.parametrize(
    ("data", "line", "found", "remedy"),
    [
        (WORDS.encode("latin-1"), 3, "byte 0xfc", "latin-1"),
        (WORDS.encode("cp1252") * 400_000, 3, "byte 0xfc", "latin-1"),
        (("a" * 70_000 + "\n").encode() * 40 + WORDS.encode("latin-1"), 43, "byte 0xfc", "latin-1"),
        (WORDS.encode("utf-16"), 1, "byte 0xff", "utf-16"),
        (WORDS.encode("utf-16-be"), 3, "byte 0xfc", "latin-1"),
        (WORDS.encode()[:-1] + "é".encode()[:1], 4, "in the middle of a character", "latin-1"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), 1, "byte 0x89", "latin-1"),
    ],
    ids=["latin-1", "long", "a later line", "utf-16", "no mark", "cut", "picture"],
)
def test_bytes_that_are_not_utf_8_are_refused_by_line(tmp_path, data, line, found, remedy):
    (tmp_path / "a.txt").write_bytes(data)
    (said,) = refusals(tmp_path / "a.txt")
    if "NUL" not in said:
        assert f"{str(tmp_path / 'a.txt')!r}, line {line}, is not UTF-8" in said and found in said
        assert said.endswith(f"say what it is in with `encoding`, e.g. {remedy}")
    else:
        assert "no mark" in os.environ["PYTEST_CURRENT_TEST"] and "line 1, has a NUL character" in said


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_an_encoding_that_is_named_is_read_and_held_to(tmp_path, suffix):
    for encoding in ("latin-1", "utf-16", "utf-8", "cp1252"):
        path = tmp_path / f"a{suffix}"
        text = WORDS if suffix == ".txt" else json.dumps({"text": WORDS}, ensure_ascii=False)
        path.write_bytes(text.encode(encoding))
        assert list(read_file(path, encoding=encoding)) == [WORDS]
        if encoding == "latin-1":
            assert "line" in (said := refusals(path).pop()) and "`encoding`, e.g. latin-1" in said
            assert all("is not ASCII" in one for one in refusals(path, encoding="ascii"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + WORDS.encode())
    assert list(read_file(tmp_path / "a.txt")) == [WORDS]  # the mark is no character
    for name in ("base64", "rot13", "nothing", "", "a\0b", "utf-8;", "utf-8\n", "undefined"):
        with pytest.raises(ValueError, match="is no encoding of text"):
            check_encoding(name)


def test_nul_characters_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\x00\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\x00"}\n')
    for name in ("a.txt", "b.jsonl"):
        assert "line 2, has a NUL character" in refusals(tmp_path / name).pop()
    path = tmp_path / "c.txt"
    path.write_bytes(b"12345\n" * 100 + b"\x00")
    with pytest.raises(ValueError, match="line 101, has a NUL"):
        list(text_pieces(path, piece=7))


RECORDS = {
    '{"text": null}': "has null in the field text; wanted text",
    '{"text": 5}': "has 5 in the field text",
    '{"text": ["a", "b"]}': r'has \["a", "b"\] in the field text',
    '{"text": {"a": "' + "b" * 99 + '"}}': r'has \{"a": "b+ \.\.\. in the field text',
    "[1, 2]": "is a list, wanted a record",
    '"abc"': "is text alone, wanted a record",
    "null": "is null, wanted a record",
    "true": "is true or false",
    "1.5": "is a number",
    '{"text": "a"': "is not valid jsonl: Expecting",
    "[" * 100_000: "is nested too deeply",
    "9" * 5000: "is not valid jsonl: Exceeds the limit",
    '{"messages": ["hi"]}': 'has "hi" for a turn of a conversation',
    '{"messages": "hi"}': 'has "hi" for a conversation; wanted a list',
    '{"messages": [{"role": "user", "content": 5}]}': "has the fields role, content; wanted role and content as text",
    '{"instruction": null, "output": "a"}': "has null in the field instruction",
    '{"instruction": "a", "output": 3}': "has 3 in the field output",
    '{"instruction": "a", "input": 3, "output": "b"}': "has 3 in the field input",
    '{"input_ids": [1, 1.5]}': "has 1.5 among its input_ids; wanted whole numbers",
    '{"input_ids": [1, true]}': "has true among its input_ids",
    '{"input_ids": [[1], [2]]}': r"has \[1\] among its input_ids",
    '{"input_ids": 7}': "has 7 for input_ids; wanted a list",
    '{"input_ids": [99999999999999999999]}': "that no vocabulary holds",
    "{}": "has the fields none; wanted text",
    '{"text": "a\\ud800b"}': r"has half of a character \(\\ud800 alone\); wanted text",
    '{"messages": [{"role": "user", "content": "\\udfff"}]}': r"has half of a character \(\\udfff alone\)",
}


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_records_of_other_shapes_are_refused_by_line(tmp_path, record):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + record + "\n")
    with pytest.raises(ValueError, match=RECORDS[record]) as raised:
        load_sequences([str(path)], TOKENIZER, 2)
    assert f"{str(path)!r}, line 3" in str(raised.value)
    if record.startswith("{") and record.endswith("}"):
        (tmp_path / "b.json").write_text(f'[{{"text": "fine"}}, {record}]')
        with pytest.raises(ValueError, match=RECORDS[record].replace("jsonl", "json")) as raised:
            load_sequences([str(tmp_path / "b.json")], TOKENIZER, 2)
        assert "b.json', record 2" in str(raised.value)


def test_lines_may_end_anywhere_in_a_block(tmp_path, monkeypatch):
    path, texts = tmp_path / "a.jsonl", [f"{'x' * n} é" for n in range(60)]
    path.write_text("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    for block in (1, 7, 64):
        monkeypatch.setattr("lizard_models.text.decoding.BLOCK", block)
        monkeypatch.setattr(
            "lizard_models.text.records.text_pieces", lambda path, encoding, b=block: text_pieces(path, encoding, b)
        )
        assert list(read_file(path)) == texts


def test_files_that_are_no_arrays_or_tables_are_named(tmp_path):
    np.savez(tmp_path / "archive.npz", a=np.arange(4))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "cut.npy", np.arange(1000))
    os.truncate(tmp_path / "cut.npy", 500)
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\x20\x00{'descr': '<i8', 'shape': (3")
    np.save(tmp_path / "flags.npy", np.array([True, False]))
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a" * 50}] * 300), tmp_path / "cut.parquet")
    os.truncate(tmp_path / "cut.parquet", 400)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "null.parquet")
    for name, said in {
        "archive.npy": "it is an archive of arrays",
        "empty.npy": "is not an array of token ids",
        "cut.npy": "is not an array of token ids",
        "header.npy": "is not an array of token ids",
        "flags.npy": "holds bool",
        "no.parquet": "is not valid parquet",
        "cut.parquet": "is not valid parquet",
        "null.parquet": "record 2, has null in the field text",
    }.items():
        with pytest.raises(ValueError, match=said) as raised:
            load_sequences([str(tmp_path / name)], TOKENIZER, 2)
        assert name in str(raised.value)
    for name in ("empty.npy", "header.npy", "archive.npy"):
        with pytest.raises(ValueError, match="is not an array of token ids"):
            list(stream_tokens([str(tmp_path / name)]))


def test_hidden_files_and_what_runs_write_are_not_read(tmp_path):
    folder = save_texts(tmp_path / "texts", count=2)
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "text-0.txt").write_text("again")
    (folder / ".hidden.txt").write_text("hidden")
    for name, marks in {"model": ("config.json", "training.json"), "model.training": ("plan.json",)}.items():
        (folder / name / "stage1").mkdir(parents=True)
        for mark in marks:
            (folder / name / mark).write_text("{}")
        (folder / name / "stage1" / "run.json").write_text("{}")
    (folder / "mine").mkdir()
    (folder / "mine" / "training.json").write_text('{"text": "mine"}')  # a name alone makes no output
    read = [path.relative_to(folder).as_posix() for path in find_sources(str(folder))]
    assert read == ["mine/training.json", "text-0.txt", "text-1.txt"]
    assert len(files_left_out(str(folder))) == 7 and files_left_out(str(folder / "text-0.txt")) == []
    inside = tmp_path / ".data"
    save_texts(inside)
    assert len(find_sources(str(inside))) == 3  # what was asked for by its name is read
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / ".a.txt").write_text("hidden")
    with pytest.raises(ValueError, match="but 1 hidden files or outputs of runs, which are not read"):
        find_sources(str(tmp_path / "only"))
    for empty in ("", " "):
        with pytest.raises(ValueError, match="a source is empty"):
            find_sources(empty)


def test_the_overlap_is_that_of_comparing_every_run(monkeypatch):
    monkeypatch.setattr(overlapping, "BLOCK", 50)
    rows = tokens(12, 40)
    training = PackedTokens(rows[:8].flatten().numpy().astype(np.uint16), 40)
    documents = torch.cat([rows[8:11], rows[3:4]])
    documents[1, 2:38] = rows[5, 1:37]  # 36 tokens in a row: 5 of its runs
    documents[2, :31] = rows[6, :31]  # one token short of a run
    runs = {tuple(rows[:8].flatten()[i : i + RUN].tolist()) for i in range(320 - RUN + 1)}
    wanted = [
        sum(tuple(row[i : i + RUN].tolist()) in runs for i in range(40 - RUN + 1)) / (40 - RUN + 1) for row in documents
    ]
    found = overlap(documents, training)
    assert found.by_document == pytest.approx(wanted) and wanted == pytest.approx([0, 5 / 9, 0, 1])
    assert found.share == pytest.approx(sum(wanted) / 4)
    assert "38.9% of the evaluation text stands in the training text too" in found.told()
    assert "(document 2 56%, document 4 100%)" in found.told()
    assert overlap(documents[:1], training).told() == "" and overlap(documents[:, : RUN - 1], training) is None


def test_text_of_the_command_line_is_what_was_typed():
    assert argument_text("Grüße", "prompt") == "Grüße"
    assert argument_text(os.fsdecode("é".encode()), "prompt") == "é"
    with pytest.raises(ValueError, match="prompt: it is not UTF-8"):
        argument_text("\udce9", "prompt")


def test_a_run_tells_of_it_all(tmp_path):
    save_teacher(tmp_path / "teacher")
    folder = save_texts(tmp_path / "texts")
    (folder / ".a.txt").write_text("hidden")
    (tmp_path / "other.txt").write_text("".join(chr(97 + n * n % 23) for n in range(300)) + SENTENCE)
    command = ["linearize", tmp_path / "teacher", "--data", folder, "--eval-length", "150", "--out", tmp_path / "out"]
    command += ["--stage1-steps", "1", "--stage2-steps", "0", "--seq-len", "64", "--batch-size", "2"]
    command += ["--preset", "plain", "--device", "cpu", "--eval-documents", "2"]
    output = call(*command, "--eval-data", folder).output
    assert output.count("% of the evaluation text stands in the training text too") == 1
    assert f"not read in {folder}: 1 hidden files or outputs of runs, such as {folder / '.a.txt'}" in output
    command[command.index("--out") + 1] = tmp_path / "another"
    assert "stands in the training text" not in call(*command, "--eval-data", tmp_path / "other.txt").output
    (folder / "b.txt").write_bytes("Grüße".encode("latin-1"))
    command[command.index("--out") + 1] = tmp_path / "third"
    line = error(*command)
    assert line.endswith("say what it is in with --encoding, e.g. latin-1") and "b.txt', line 1" in line
    assert "--encoding: 'rot13' is no encoding" in error(*command, "--seed", "1", "--encoding", "rot13")
    call(*command, "--encoding", "latin-1")
