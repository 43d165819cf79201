"""Documents out of local files, folders and hub data sets: as text, or as token ids where they come tokenised."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lizard_models.files.sources import expanded, hub_answers
from lizard_models.text.decoding import UTF8, read_text_file
from lizard_models.text.records import read_records, record_at

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".npy")
Chat = list[dict[str, str]]  # turns, each with "role" and "content"
Document = str | np.ndarray | Chat  # text, token ids [T], or a conversation for the model's own template
HUB_SECONDS = 3.0
SHOWN = 60  # characters of a value in an error
FIRST = 100  # documents of a hub data set by which it is known where it has no commit
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # other sets' names for them


def find_sources(source: str) -> list[Path] | None:
    """The files behind a source, in sorted order; None if the source names a hub data set.

    source: a file, a folder (searched through, but for hidden files and folders, and what runs write there), or
    owner/name of a hub data set, owner/name:configuration if it has several. Raises ValueError for a path that does not
    exist, an unknown suffix, or a folder without readable files.
    """
    if not source.strip():
        raise ValueError("data: a source is empty; give a file, a folder, or owner/name of a hub data set")
    path = expanded(source, "data")
    if path.is_dir():
        files, left = _walked(path)
        if not files:
            beside = f", but {len(left)} hidden files or outputs of runs, which are not read" if left else ""
            raise ValueError(f"data: folder {source!r} holds none of {', '.join(SUFFIXES)}{beside}")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"data: {source!r} ends in {path.suffix!r}, wanted one of {', '.join(SUFFIXES)}")
        return [path]
    looks_local = path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.endswith("/")
    if looks_local or source.count("/") != 1:
        raise ValueError(f"data: {source!r} does not exist; give a file, a folder, or owner/name of a hub data set")
    return None


def files_left_out(source: str) -> list[Path]:
    """The files of a folder that would be text, and are hidden or an output of a run."""
    path = expanded(source, "data")
    return _walked(path)[1] if path.is_dir() else []


def _walked(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder that are text, and those that are hidden or that a run has written or writes, sorted."""
    text: list[Path] = []
    left: list[Path] = []
    outputs: dict[Path, bool] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
        inner = path.relative_to(folder)
        parents = [folder / parent for parent in inner.parents]
        for parent in parents:
            if parent not in outputs:
                outputs[parent] = _is_output(parent)
        hidden = any(part.startswith(".") for part in inner.parts)
        (left if hidden or any(outputs[parent] for parent in parents) else text).append(path)
    return text, left


def _is_output(folder: Path) -> bool:
    """Whether a folder is a model that a run has saved, or the work of one."""
    saved = (folder / "config.json").is_file() and (folder / "training.json").is_file()
    return saved or (folder.name.endswith(".training") and (folder / "plan.json").is_file())


def read_file(path: Path, text_field: str | None = None, encoding: str = UTF8) -> Iterator[Document]:
    """The documents of one file.

    .txt is one document. .json (a list), .jsonl and .parquet are records, see ``document_of``. .npy holds token ids:
    [T] is one document, [N, T] is N. encoding: of text and JSON. Raises ValueError, with file and line, for anything
    else.
    """
    if path.suffix == ".txt":
        yield read_text_file(path, encoding)
    elif path.suffix == ".npy":
        yield from _read_ids(path)
    else:
        for record in read_records(path, encoding):
            yield document_of(record.value, record.where, text_field)


def read_hub(name: str, text_field: str | None = None) -> Iterator[Document]:
    """The documents of the train split of a hub data set, streamed. Raises ValueError if it cannot be reached."""
    from datasets import load_dataset  # slow to import, and not needed for local text

    if not hub_answers():
        raise ValueError(f"data: {name!r} is not a local file or folder, and the hub does not answer")
    repository, _, configuration = name.partition(":")
    try:
        records = load_dataset(repository, configuration or None, split="train", streaming=True)
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data: {name!r} is neither a local file or folder nor a hub data set in reach: {reason}"
        ) from error
    for number, value in enumerate(records, 1):
        yield document_of(*record_at(value, f"{name!r}, record {number}"), text_field)


def hub_version(name: str, text_field: str | None = None) -> str:
    """What tells a hub data set from a changed one: its commit, or its first documents where the hub says none."""
    from huggingface_hub import HfApi

    try:
        return f"commit {HfApi().dataset_info(name.partition(':')[0], timeout=HUB_SECONDS).sha}"
    except Exception:  # the hub's client raises many kinds; a mirror may have data sets without this question
        first = islice(read_hub(name, text_field), FIRST)
        digest = hashlib.sha256()
        for document in first:
            text = document.tolist() if isinstance(document, np.ndarray) else document
            digest.update(json.dumps(text).encode())
        return f"first {FIRST} {digest.hexdigest()}"


def document_of(record: dict, where: str, text_field: str | None = None) -> Document:
    """The text, the conversation or the token ids of a record.

    Taken from ``text_field`` if given, else from the first of these that it has: ``text``; ``messages`` (turns with
    role and content) or ``conversations`` (turns with from and value); ``instruction`` / ``input`` / ``output``;
    ``prompt`` and ``completion`` (or ``response``), as two turns; ``input_ids``. Raises ValueError naming ``where``
    and the record's fields if there is none of these, and for a field that does not hold what it should.

    where: the file and the line, or the data set and the number of the record.
    """
    if text_field is not None:
        if text_field in record:
            return _text(record, text_field, where)
    elif "text" in record:
        return _text(record, "text", where)
    elif turns := record.get("messages") or record.get("conversations"):
        if not isinstance(turns, list):
            raise ValueError(f"data: {where}, has {_shown(turns)} for a conversation; wanted a list of turns")
        return [_turn(turn, where) for turn in turns]
    elif "instruction" in record and "output" in record:
        context = "" if record.get("input") is None else _text(record, "input", where)
        return format_instruction(_text(record, "instruction", where), context, _text(record, "output", where))
    elif "prompt" in record and (answer := record.get("completion") or record.get("response")):
        return [
            _turn({"role": "user", "content": record["prompt"]}, where),
            _turn({"role": "assistant", "content": answer}, where),
        ]
    elif "input_ids" in record:
        return _ids(record["input_ids"], where)
    wanted = text_field or "text, messages, instruction and output, prompt and completion, or input_ids"
    fields = ", ".join(map(str, record)) or "none"
    raise ValueError(f"data: {where}, has the fields {fields}; wanted {wanted} (text_field)")


def _text(record: dict, field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"data: {where}, has {_shown(value)} in the field {field}; wanted text")
    return _characters(value, where)


def _characters(text: str, where: str) -> str:
    """The text. Raises ValueError for half a surrogate pair, which JSON can hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"data: {where}, has half of a character ({found} alone); wanted text") from None
    return text


def _ids(value: Any, where: str) -> np.ndarray:
    """Token ids [T]. Raises ValueError for numbers that are none, and for lists of lists."""
    if isinstance(value, list) and any(type(item) is not int for item in value):
        odd = next(item for item in value if type(item) is not int)
        raise ValueError(f"data: {where}, has {_shown(odd)} among its input_ids; wanted whole numbers")
    try:
        ids = np.asarray(value, dtype=np.int64) if isinstance(value, list) else np.asarray(value)
    except OverflowError:
        raise ValueError(f"data: {where}, has a number among its input_ids that no vocabulary holds") from None
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"data: {where}, has {_shown(value)} for input_ids; wanted a list of whole numbers")
    return ids


def _turn(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f"data: {where}, has {_shown(turn)} for a turn of a conversation; wanted role and content")
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value") or ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f"data: a turn of a conversation in {where}, has the fields {', '.join(map(str, turn))}; "
            "wanted role and content as text"
        )
    return {"role": ROLES.get(role, role), "content": _characters(content, where)}


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def in_own_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether ``format_chat`` has a chat template, which also writes what stands before a conversation."""
    return tokenizer is not None and tokenizer.chat_template is not None


def format_chat(turns: Chat, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A conversation as one text: in the chat template of the tokenizer, or plainly if it has none."""
    if tokenizer is None or not in_own_template(tokenizer):
        return "\n\n".join(f"### {turn['role'].capitalize()}:\n{turn['content'].strip()}" for turn in turns)
    return in_template(turns, tokenizer)


def in_template(turns: Chat, tokenizer: Any, **options: Any) -> str:
    """Turns in a tokenizer's chat template. Raises ValueError for a template that cannot be used."""
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))
    except Exception as error:  # a template is a program of the model's author
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"chat: the model's chat template cannot be used ({type(error).__name__}: {reason})"
        ) from error


def format_instruction(instruction: str, context: str, output: str) -> str:
    """An instruction record as one text."""
    question = f"### Instruction:\n{instruction.strip()}\n\n"
    if context.strip():
        question += f"### Input:\n{context.strip()}\n\n"
    return f"{question}### Response:\n{output.strip()}"


def _read_ids(path: Path) -> Iterator[np.ndarray]:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TypeError, SyntaxError, zipfile.BadZipFile) as error:  # what a broken header gives
        raise ValueError(f"data: {str(path)!r} is not an array of token ids: {error}") from error
    if not isinstance(ids, np.ndarray):
        raise ValueError(f"data: {str(path)!r} is not an array of token ids: it is an archive of arrays")
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"data: {str(path)!r} holds {ids.dtype} {list(ids.shape)}, wanted integer ids [T] or [N, T]")
    yield from ids if ids.ndim == 2 else [ids]
