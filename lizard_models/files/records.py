"""Small JSON files of a run: whole, with sums, and named where they are damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lizard_models.files.folders import write_whole

RECORD_SUMS = "sums.json"
SEAL = "sha256"


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file holds. Raises ValueError, with the file's name and ``remedy``, for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from error


def write_record(path: Path, value: Any) -> None:
    """Writes ``value`` as JSON, whole or not at all, and its sha256 into the folder's ``sums.json``.

    That file comes first, with the sum of what was there too, so that both agree wherever a write is stopped.
    """
    text = json.dumps(value)
    sums = _sums(path.parent)
    before = [hashlib.sha256(path.read_bytes()).hexdigest()] if path.is_file() else []
    sums[path.name] = [hashlib.sha256(text.encode()).hexdigest(), *before]
    write_whole(path.parent / RECORD_SUMS, json.dumps(sums, indent=2) + "\n")
    write_whole(path, text)


def read_record(path: Path, remedy: str, required: bool) -> Any:
    """The inverse of ``write_record``; None where nothing was written.

    required: whether there must be a sum; work of earlier versions has none. Raises ValueError, with the file's name
    and ``remedy``, for one that is damaged, or that is not what was written, or gone.
    """
    sums = _sums(path.parent)
    if not path.is_file():
        if is_gone(path):
            raise ValueError(f"{path} is missing: {remedy}")
        return None
    if required and not (path.parent / RECORD_SUMS).is_file():
        raise ValueError(f"{path.parent / RECORD_SUMS} is missing, and with it the sum of {path}: {remedy}")
    known = sums.get(path.name, () if required else None)
    if known is not None and hashlib.sha256(path.read_bytes()).hexdigest() not in known:
        raise ValueError(f"{path} is damaged (another sha256 than when it was written): {remedy}")
    return read_json(path, remedy)


def is_gone(path: Path) -> bool:
    """Whether ``write_record`` wrote there, and the file is not there any more."""
    if path.is_file():
        return False
    return len(_sums(path.parent).get(path.name, ())) > 1  # a second version was on its way: the first one was there


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the sha256 of all of them, under ``sha256``."""
    text = json.dumps(values, sort_keys=True)
    return {**values, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def seal_broken(values: dict[str, Any]) -> bool:
    """Whether values that were sealed are not what they were; those of earlier versions were not."""
    return SEAL in values and sealed({key: value for key, value in values.items() if key != SEAL}) != values


def _sums(folder: Path) -> dict[str, list[str]]:
    path = folder / RECORD_SUMS
    remedy = f"delete {str(path)!r} and the files it names, and what they hold is measured again"
    sums = read_json(path, remedy) if path.is_file() else {}
    if not isinstance(sums, dict) or not all(isinstance(value, list) for value in sums.values()):
        raise ValueError(f"{path} is damaged (no lists of sums by name): {remedy}")
    return sums
