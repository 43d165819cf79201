"""Cases of inputs on the disk: files of text, records, encodings, folders, permissions, teachers, models."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from benchmarks.faults.input_places import folders, models, permissions
from benchmarks.faults.input_values import fields, flags, recipes
from benchmarks.faults.inputs import ANY, SHORT, Case, InputWorld

TEXT = "Grüße an alle, 12 €. "
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".npy")


def _array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.arange(4))
    return file.getvalue()


def _table(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


WHOLE = {
    ".txt": TEXT.encode(),
    ".json": json.dumps([{"text": TEXT}]).encode(),
    ".jsonl": json.dumps({"text": TEXT}).encode(),
    ".parquet": _table([{"text": TEXT}]),
    ".npy": _array(np.arange(9)),
}
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "NUL": b"a\n\0b\n",
    "random bytes": bytes(np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8)),
    "UTF-16": ("\ufeff" + TEXT).encode("utf-16-le"),
    "UTF-32": TEXT.encode("utf-32"),
    "Latin-1": TEXT.split("€")[0].encode("latin-1"),
    "a lone byte at the end": b"abc\xc3",
    "surrogates": b'{"text": "\\ud800"}',
    "gzip": gzip.compress(TEXT.encode()),
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(40),
    "an archive of arrays": _archive(),
    "a pickle": _pickled(),
    "brackets": b"[" * 50_000,
    "numbers": b"9" * 5000,
    "white space": b" \n\t\n " * 9,
}


def files() -> Iterator[Case]:
    """Files that are not what their names say, and names that are none."""
    for suffix, (name, content) in product(SUFFIXES, CONTENTS.items()):
        wanted = rf"data: .*(x{suffix}|{SHORT})"
        if suffix == ".txt" and name in ("brackets", "numbers"):
            continue  # text like any other
        yield Case("files", f"{name}{suffix}", _data(f"x{suffix}", content), wanted)
    for suffix, other in product(SUFFIXES, SUFFIXES):
        if suffix != other:
            yield Case("files", f"{other[1:]} as {suffix}", _data(f"x{suffix}", WHOLE[other]), rf"x{suffix}|{SHORT}")
        if suffix == other and suffix != ".txt":
            cut = WHOLE[suffix][: len(WHOLE[suffix]) * 2 // 3]
            yield Case("files", f"cut{suffix}", _data(f"x{suffix}", cut), rf"x{suffix}")
    arrays: dict[str, Any] = {
        "floats": np.ones(9),
        "truths": np.array([True]),
        "texts": np.array(["a"]),
        "dates": np.array(["2020"], "M8[D]"),
        "negative": np.array([-1, 2]),
        "too large": np.array([1 << 40]),
        "three axes": np.ones((2, 2, 2), int),
        "none": np.array(5),
        "records": np.array([(1, 2)], dtype=[("a", int), ("b", int)]),
        "complex": np.ones(3) * 1j,
        "no rows": np.ones((0, 9), int),
        "unsigned": np.array([1 << 63], np.uint64),
    }
    for name, values in arrays.items():
        yield Case("files", f"array, {name}", _data("x.npy", _array(values)), rf"data: .*|{SHORT}")
    names = ["x.TXT", "x", "x.pdf", "x.txt.gz", ".txt", "x.py", "x.csv", "x.bin"]
    for name in names:
        yield Case("files", f"named {name}", _data(name, TEXT.encode()), r"data: ")
    for name in (
        "a b.txt",
        "[red]b.txt",
        "ä.txt",
        "a\nb.txt",
        "-x.txt",
        "x'y\".txt",
        "%s{0}.txt",
        "😀.txt",
        "a\udcff.txt",
    ):
        yield Case("files", f"a name with {name!a}", _data(name, TEXT.encode()), SHORT)
        yield Case("files", f"refused, with {name!a}", _data(name, b"\0"), r"has a NUL character")
    for name in (
        "x" * 300 + ".txt",
        "a/" * 3000 + "b.txt",
        "a\0b.txt",
        "~nobody-at-all/x.txt",
        "http://localhost/x.txt",
        "s3://bucket/x",
        "owner/name",
        "owner/name:part",
        "a/b/c",
        "\\",
        "*",
        "*.txt",
        "/dev/null",
        "/proc/self/mem",
        "/dev/full",
        "..",
        "~",
        "$HOME",
        "-",
    ):
        yield Case("files", f"typed {name[:30]!a}", _typed(name), ANY)
    for name, make in SPECIAL.items():
        yield Case("files", name, make, r"data: ")


def _data(name: str, content: bytes) -> Callable[[Path, InputWorld], list[str]]:
    def make(folder: Path, world: InputWorld) -> list[str]:
        (folder / name).write_bytes(content)
        return world.linearize(folder, data=folder / name)

    return make


def _typed(name: str) -> Callable[[Path, InputWorld], list[str]]:
    return lambda folder, world: world.linearize(folder, data=name)


def _made(make: Callable[[Path], None], name: str = "x.txt") -> Callable[[Path, InputWorld], list[str]]:
    def all_of_it(folder: Path, world: InputWorld) -> list[str]:
        make(folder)
        return world.linearize(folder, data=folder / name)

    return all_of_it


SPECIAL: dict[str, Callable[[Path, InputWorld], list[str]]] = {
    "a pipe": _made(lambda folder: os.mkfifo(folder / "x.txt")),
    "a dangling link": _made(lambda folder: (folder / "x.txt").symlink_to("nowhere")),
    "a link to itself": _made(lambda folder: (folder / "x.txt").symlink_to("x.txt")),
    "a folder with a file's name": _made(lambda folder: (folder / "x.txt").mkdir()),
    "an empty folder": _made(lambda folder: (folder / "x").mkdir(), "x"),
    "a folder that links to itself": _made(
        lambda folder: ((folder / "x").mkdir(), (folder / "x" / "y").symlink_to("."))[0], "x"
    ),  # type: ignore[arg-type]
    "a folder of pipes": _made(lambda folder: ((folder / "x").mkdir(), os.mkfifo(folder / "x" / "y.txt"))[0], "x"),  # type: ignore[arg-type]
}

VALUES = [
    "null",
    "5",
    "1.5",
    "true",
    "[]",
    "{}",
    '""',
    '[1, "a"]',
    '[{"role": 5}]',
    '{"a": {"b": [1]}}',
    "1e999",
    "-1",
    "[[1]]",
    "[-5]",
    '["a"]',
]
FIELDS = ("text", "messages", "conversations", "instruction", "prompt", "input_ids", "body")
BESIDE = {"instruction": ', "output": "b"', "prompt": ', "completion": "b"'}
LINES = [
    "5",
    '"a"',
    "null",
    "true",
    "[1, 2]",
    "[]",
    "{}",
    "{",
    "}",
    '{"text": "a"',
    '{"text": "a"}}',
    '{"text": "a"} {"text": "b"}',
    "text",
    "'",
    "{'text': 'a'}",
    "[" * 99_999,
    "9" * 5000,
    "NaN",
    '{"text": NaN}',
    "\x00",
    "\u2028",
    '{"a": 1, "a": 2}',
    '{"messages": [{"role": "user", "content": null}]}',
    '{"messages": [[]]}',
    '{"conversations": [{"from": 1, "value": 2}]}',
    '{"instruction": "a", "input": 5, "output": "b"}',
    '{"instruction": "a", "output": null}',
    '{"prompt": "a", "completion": 7}',
    '{"input_ids": [1, 1.5]}',
    '{"input_ids": [99999999999999999999]}',
    '{"input_ids": [300]}',
    '{"input_ids": [1, true]}',
]


def records() -> Iterator[Case]:
    """Records of other shapes: each is refused by file and line or number, or there is too little text."""
    wanted = r"data: .*x\.jsonl?', (line 3|record 2)|data: .*x\.json' is (not valid|nested)|has a NUL|data: token ids"
    wanted += f"|{SHORT}"
    for field, value in product(FIELDS, VALUES):
        record = f'{{"{field}": {value}{BESIDE.get(field, "")}}}'
        yield Case("records", f"{field}: {value}", _data("x.jsonl", f'{{"text": "a"}}\n\n{record}\n'.encode()), wanted)
    for line in LINES:
        for suffix, around in ((".jsonl", '{{"text": "a"}}\n\n{}\n'), (".json", '[{{"text": "a"}}, {}]')):
            content = around.format(line).encode()
            yield Case("records", f"{line[:60]}{suffix}", _data(f"x{suffix}", content), wanted)
    rows: dict[str, list[dict]] = {
        "null": [{"text": "a"}, {"text": None}],
        "numbers": [{"text": 5}],
        "lists": [{"text": ["a"]}],
        "no field": [{"body": "a"}],
        "no rows": [],
        "bytes": [{"text": b"a"}],
        "floats": [{"input_ids": [1.5]}],
        "structs": [{"messages": [{"role": 5}]}],
    }
    for name, table in rows.items():
        yield Case("records", f"parquet, {name}", _data("x.parquet", _table(table)), r"data: ")


ENCODINGS = (
    "utf-8",
    "utf-8-sig",
    "latin-1",
    "cp1252",
    "utf-16",
    "utf-16-be",
    "utf-32",
    "ascii",
    "shift_jis",
    "gb18030",
    "koi8-r",
    "utf-7",
    "big5",
    "iso2022_jp",
    "cp037",
    "UTF8",
    "unicode_escape",
    "raw_unicode_escape",
    "punycode",
    "idna",
)
NO_ENCODINGS = (
    "",
    " ",
    "base64",
    "rot13",
    "hex",
    "zip",
    "undefined",
    "nope",
    "utf-8\n",
    "mbcs",
    "none",
    "\udcff",
    "utf-8;",
)


def encodings() -> Iterator[Case]:
    """Text in one encoding read as another."""
    for written, read in product(("utf-8", "latin-1", "utf-16", "cp037", "shift_jis"), ENCODINGS):
        content = "wind und mühle\n".replace("ü", "ü" if written != "shift_jis" else "u").encode(written)
        for suffix in (".txt", ".jsonl"):
            wanted = rf"data: .*x\{suffix}'|encoding|{SHORT}"
            make = _with("--encoding", read, name=f"x{suffix}", content=content)
            yield Case("encodings", f"{written} read as {read}, {suffix}", make, wanted)
    for name in NO_ENCODINGS:
        make = _with("--encoding", name, name="x.txt", content=b"a")
        yield Case("encodings", f"read as {name!a}", make, r"--encoding: .* is no encoding of text")


def _with(*more: object, name: str, content: bytes) -> Callable[[Path, InputWorld], list[str]]:
    def make(folder: Path, world: InputWorld) -> list[str]:
        (folder / name).write_bytes(content)
        return world.linearize(folder, *more, data=folder / name)

    return make


AREAS = (files, records, encodings, flags, fields, recipes, folders, permissions, models)
