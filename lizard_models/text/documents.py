"""Documents out of local files, folders and hub data sets: as text, or as token ids where they come tokenised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lizard_models.files.sources import hub_answers

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".npy")
Chat = list[dict[str, str]]  # turns, each with "role" and "content"
Document = str | np.ndarray | Chat  # text, token ids [T], or a conversation for the model's own template
HUB_SECONDS = 3.0
FIRST = 100  # documents of a hub data set by which it is known where it has no commit
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # other sets' names for them


def find_sources(source: str) -> list[Path] | None:
    """The files behind a source, in sorted order; None if the source names a hub data set.

    source: a file, a folder (searched through), or owner/name of a hub data set, owner/name:configuration if it has
    several. Raises ValueError for a path that does not exist, an unknown suffix, or a folder without readable files.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise ValueError(f"data: folder {source!r} holds none of {', '.join(SUFFIXES)}")
        return files
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"data: {source!r} ends in {path.suffix!r}, wanted one of {', '.join(SUFFIXES)}")
        return [path]
    looks_local = path.suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.endswith("/")
    if looks_local or source.count("/") != 1:
        raise ValueError(f"data: {source!r} does not exist; give a file, a folder, or owner/name of a hub data set")
    return None


def read_file(path: Path, text_field: str | None = None) -> Iterator[Document]:
    """The documents of one file.

    .txt is one document. .json (a list), .jsonl and .parquet are records, see ``document_of``. .npy holds token ids:
    [T] is one document, [N, T] is N. Raises ValueError naming the file for anything else.
    """
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8", errors="replace")
    elif path.suffix == ".npy":
        yield from _read_ids(path)
    else:
        for record in _records(path):
            yield document_of(record, str(path), text_field)


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
    for record in records:
        yield document_of(record, name, text_field)


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
    and the record's fields if there is none of these.
    """
    if text_field is not None:
        if text_field in record:
            return str(record[text_field])
    elif "text" in record:
        return str(record["text"])
    elif turns := record.get("messages") or record.get("conversations"):
        return [_turn(turn, where) for turn in turns]
    elif "instruction" in record and "output" in record:
        return format_instruction(record["instruction"], record.get("input") or "", record["output"])
    elif "prompt" in record and (answer := record.get("completion") or record.get("response")):
        return [
            _turn({"role": "user", "content": record["prompt"]}, where),
            _turn({"role": "assistant", "content": answer}, where),
        ]
    elif "input_ids" in record:
        return np.asarray(record["input_ids"])
    wanted = text_field or "text, messages, instruction and output, prompt and completion, or input_ids"
    raise ValueError(f"data: a record of {where!r} has the fields {', '.join(record)}; wanted {wanted} (text_field)")


def _turn(turn: dict, where: str) -> dict[str, str]:
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value") or ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f"data: a turn of a conversation in {where!r} has the fields {', '.join(turn)}; "
            "wanted role and content as text"
        )
    return {"role": ROLES.get(role, role), "content": content}


def format_chat(turns: Chat, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A conversation as one text: in the chat template of the tokenizer, or plainly if it has none."""
    if tokenizer is None or tokenizer.chat_template is None:
        return "\n\n".join(f"### {turn['role'].capitalize()}:\n{turn['content'].strip()}" for turn in turns)
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def format_instruction(instruction: str, context: str, output: str) -> str:
    """An instruction record as one text."""
    question = f"### Instruction:\n{instruction.strip()}\n\n"
    if context.strip():
        question += f"### Input:\n{context.strip()}\n\n"
    return f"{question}### Response:\n{output.strip()}"


def _records(path: Path) -> Iterator[dict]:
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for line in file:
                    if line.strip():
                        yield json.loads(line)
        else:
            records = json.loads(path.read_text(encoding="utf-8"))
            yield from records if isinstance(records, list) else [records]
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {str(path)!r} is not valid {path.suffix[1:]}: {error}") from error


def _read_parquet(path: Path) -> Iterator[dict]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"data: {str(path)!r} needs pyarrow; pip install pyarrow") from error
    for batch in ParquetFile(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _read_ids(path: Path) -> Iterator[np.ndarray]:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"data: {str(path)!r} is not an array of token ids: {error}") from error
    if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"data: {str(path)!r} holds {ids.dtype} {list(ids.shape)}, wanted integer ids [T] or [N, T]")
    yield from ids if ids.ndim == 2 else [ids]
