"""Records that another machine has made, put among those that are here, measure by measure."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.quality.bench import BY_TRIALS, same_settings, trials_of
from benchmarks.quality.records import Record, change_record, merge_records, read_record, read_records
from benchmarks.quality.rows import RowSpec


def records_of(path: Path) -> dict[str, Record]:
    """The records of a file by stem: of one of JSON lines, or the one of a row that is under way (``record.json``).

    Raises ValueError for a file that is missing or neither.
    """
    if not path.is_file():
        raise ValueError(f"records: no file {path}")
    if path.suffix != ".json":
        return read_records(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {RowSpec(**record["settings"]["row"]).stem: record}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no record of a row ({error!r})") from None


def merge(path: Path, files: Iterable[Path], replace: bool = False) -> dict[str, list[str]]:
    """Puts the records of ``files`` into ``path``, and returns by stem which measures were taken from them.

    Of a row that is there with the same settings, measures are added, and those that both have are taken from the new
    record, but for shares of fewer prompts. Where it was trained again, its stages, scores and environment are the new
    record's, and ``earlier`` names the measures that are of the model before.

    Raises ValueError, and changes nothing, where a row is there, or in a file before, with other settings or measured
    on other texts; ``replace`` puts the new in its place.
    """
    taken: dict[str, list[str]] = {}
    found = [(file, stem, record) for file in files for stem, record in records_of(file).items()]
    known = read_records(path)
    for file, stem, record in found:
        if not replace and not _alike(known.setdefault(stem, record), record):
            raise ValueError(
                f"{file}: {stem} is in {path}, or in a file before, with other settings or measured on other texts; "
                "--replace takes the new row instead"
            )
    for _, stem, record in found:
        old = read_record(path, stem)
        if old is None or not _alike(old, record):
            merge_records(path, {stem: record})
            taken[stem] = [*record["measures"]]
        elif names := [name for name in record["measures"] if _counts(name, old, record)]:
            change_record(path, stem, functools.partial(_add, record, names))
            taken[stem] = taken.get(stem, []) + names
        else:
            taken.setdefault(stem, [])
    return taken


def _alike(old: Record, new: Record) -> bool:
    """Of one row, and measured on the same texts. What the stages read may differ: they are one record's, whole."""
    texts = [key for key in old["hashes"].keys() & new["hashes"].keys() if not key.startswith("stage")]
    return same_settings(old["settings"], new["settings"]) and all(old["hashes"][k] == new["hashes"][k] for k in texts)


def _counts(name: str, old: Record, new: Record) -> bool:
    return name not in old["measures"] or name not in BY_TRIALS or trials_of(new, name) >= trials_of(old, name)


def _add(new: Record, names: list[str], there: Record) -> None:
    again = bool(new["stages"]) and new["stages"] != there["stages"]
    before = there["measures"] if again else there.get("earlier", [])  # of another model than the record's
    earlier = [name for name in before if name not in names] + [n for n in names if n in new.get("earlier", [])]
    if again:
        for key in ("settings", "stages", "after_stage1", "after_stage2", "scores", "places", "environment", "seconds"):
            _take(there, new, key)
    there["measures"] |= {name: new["measures"][name] for name in names}
    there["hashes"] |= new["hashes"]
    trials = there.get("trials", {}) | {k: v for k, v in new.get("trials", {}).items() if k in names}
    for key, value in (("trials", trials), ("earlier", earlier)):
        there.pop(key, None)
        if value:
            there[key] = value


def _take(there: Record, new: Record, key: str) -> None:
    value: Any = new.get(key)
    there.pop(key, None)
    if value is not None:
        there[key] = value
