"""Records of rows in JSON lines: one file a budget, one record a line, sorted by the row's name and seed.

A line is the record with its row's ``stem`` in front. Whoever adds a record reads the file, puts the record in and
renames a new file over it, under a lock on the folder: readers see one whole file or the other, and no writer loses
what another has added.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lizard_models.files.environment import without_nan

Record = dict[str, Any]


def read_records(path: Path) -> dict[str, Record]:
    """Every record of a file by its stem, in order; none where there is no file.

    Raises ValueError for a line that is no record.
    """
    return {stem: _read(line) for stem, line in _lines(path).items()}


def read_record(path: Path, stem: str) -> Record | None:
    """The record of one row, None where the file has none."""
    line = _lines(path).get(stem)
    return None if line is None else _read(line)


def merge_records(path: Path, records: Mapping[str, Record]) -> None:
    """Puts records into a file, each in the place of that of the same stem. The file need not exist."""
    with _locked(path.parent):
        lines = _lines(path) | {stem: _line(stem, record) for stem, record in records.items()}
        write_whole(path, "".join(f"{lines[stem]}\n" for stem in sorted(lines)))


def change_record(path: Path, stem: str, change: Callable[[Record], None]) -> None:
    """Changes one record where it stands, read again under the lock.

    Raises ValueError where the file has none of that stem.
    """
    with _locked(path.parent):
        record = read_record(path, stem)
        if record is None:
            raise ValueError(f"records: {path} has none of {stem}")
        change(record)
        lines = _lines(path) | {stem: _line(stem, record)}
        write_whole(path, "".join(f"{lines[name]}\n" for name in sorted(lines)))


def write_json(path: Path, values: Record) -> None:
    """Writes a JSON file whole or not at all, without NaN."""
    write_whole(path, json.dumps(without_nan(values), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(draft, 0o644)
    os.replace(draft, path)


def _line(stem: str, record: Record) -> str:
    return json.dumps({"stem": stem, **without_nan(record)}, ensure_ascii=False)


def _read(line: str) -> Record:
    record = json.loads(line)
    del record["stem"]
    return record


def _lines(path: Path) -> dict[str, str]:
    """The lines of a file by stem; parsed once for every state of the file."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}
    return _parsed(path, state.st_ino, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=8)
def _parsed(path: Path, *state: int) -> dict[str, str]:
    lines = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            lines[str(json.loads(line)["stem"])] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no record of a row ({error!r})") from None
    return lines


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time in a folder. The lock is on the folder itself, so that no file of it stays behind."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
