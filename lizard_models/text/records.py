"""Records out of JSON, JSON lines and parquet, each with the place it stands in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lizard_models.text.decoding import UTF8, read_text_file, text_pieces


class Record(NamedTuple):
    """One record and where it stands, as an error says it."""

    value: dict[str, Any]
    where: str


def read_records(path: Path, encoding: str = UTF8) -> Iterator[Record]:
    """The records of one file: .jsonl, .json (a list of them, or one), .parquet.

    Raises ValueError, with file and line or number, for what is not valid or no record.
    """
    if path.suffix == ".jsonl":
        unit, values = "line", _lines(path, encoding)
    elif path.suffix == ".parquet":
        unit, values = "record", _rows(path)
    else:
        unit, values = "record", _list(path, encoding)
    for number, value in values:
        yield record_at(value, f"{str(path)!r}, {unit} {number}")


def record_at(value: Any, where: str) -> Record:
    """A record. Raises ValueError for what is none."""
    if not isinstance(value, dict):
        raise ValueError(f"data: {where}, is {_kind(value)}, wanted a record with fields such as text")
    return Record(value, where)


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, Any]]:
    rest, number = "", 0
    for piece in text_pieces(path, encoding):
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield number, _parsed(line, path, f", line {number},")
    if rest.strip():
        yield number + 1, _parsed(rest, path, f", line {number + 1},")


def _list(path: Path, encoding: str) -> Iterator[tuple[int, Any]]:
    records = _parsed(read_text_file(path, encoding), path, "")
    yield from enumerate(records if isinstance(records, list) else [records], 1)


def _parsed(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = str(error) if not place else f"{error.msg}: column {error.colno}"
        raise ValueError(f"data: {str(path)!r}{place} is not valid {path.suffix[1:]}: {found}") from error
    except ValueError as error:  # a number too long to read
        raise ValueError(f"data: {str(path)!r}{place} is not valid {path.suffix[1:]}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"data: {str(path)!r}{place} is nested too deeply to be read") from error


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"data: {str(path)!r} needs pyarrow; pip install pyarrow") from error
    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # of the system
        after = f" after record {number}" if number else ""
        raise ValueError(f"data: {str(path)!r} is not valid parquet{after}: {error}") from error


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "text alone", bool: "true or false", type(None): "null", int: "a number"}
    return kinds.get(type(value), "a number")
