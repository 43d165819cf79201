"""Token ids of texts of any length, read and tokenised piece by piece: no document is ever held."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lizard_models.text.decoding import UTF8, check_encoding, text_pieces
from lizard_models.text.documents import find_sources, format_chat, in_own_template, read_file
from lizard_models.text.text_start import text_start

PIECE = 1 << 16  # characters, or ids, read at a time
REACH = 1 << 12  # characters at the end of a piece in which a place to cut is looked for
CONTEXT = 64  # characters tokenised again before a piece, so that it does not look like the start of a text


def stream_tokens(
    sources: Sequence[str],
    tokenizer: Any = None,
    *,
    vocab_size: int | None = None,
    text_field: str | None = None,
    piece: int = PIECE,
    encoding: str = UTF8,
) -> Iterator[np.ndarray]:
    """Ids [n] of the documents behind ``sources``, laid end to end, a piece at a time.

    sources: files or folders, see ``documents.find_sources``; no hub data sets. .txt is read and tokenised by ``piece``
    characters, .npy of ids by ``piece`` ids; of .jsonl and .parquet one record or batch is held at a time, .json is
    held whole. encoding: of text and JSON. Documents of text begin as the tokenizer begins a text (``text_start``), and
    an end-of-text token stands between them. tokenizer: may be None for ids.

    Raises ValueError naming the source: missing, unreadable, text without a tokenizer, ids outside ``vocab_size``.
    """
    end = None if tokenizer is None else tokenizer.eos_token_id
    start = None if tokenizer is None else np.array(text_start(tokenizer), dtype=np.int64)
    started = False
    for document, templated in _documents(sources, tokenizer, text_field, piece, check_encoding(encoding)):
        if started and end is not None and not isinstance(document, np.ndarray):
            yield np.array([end])
        if isinstance(document, np.ndarray):
            yield check_ids(document, vocab_size)
            continue
        if tokenizer is None:
            raise ValueError(
                f"stream: {', '.join(sources)} holds text, but the model has no tokenizer; give ids (.npy)"
            )
        started = True
        if start is not None and len(start) and not templated:
            yield start
        yield from tokenise_pieces(document, tokenizer)


def count_tokens(sources: Sequence[str]) -> int | None:
    """Ids behind ``sources`` if all of them are .npy files, else None: text is counted by reading it."""
    files = [path for source in sources for path in find_sources(source) or []]
    if not files or any(path.suffix != ".npy" for path in files):
        return None
    total = 0
    for path in files:
        with path.open("rb") as file:
            total += int(np.prod(_read_header(file, path)[0]))
    return total


def tokenise_pieces(pieces: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Ids of a text that comes in pieces of characters: those of the whole text at once.

    Pieces are joined and cut between a letter and a white space, which no byte-level or SentencePiece-like tokenizer
    joins into one token; a few characters before the cut are tokenised again and their ids left out, so that what a
    tokenizer puts before a text is not put before every piece. In text without such a place in 4096 characters (some
    scripts write no spaces) the cut falls anywhere, and the ids beside it can differ from those of the whole text. Slow
    tokenizers, which give no offsets, are called without the repeated characters.
    """
    context, rest = "", ""
    for text in pieces:
        rest += text
        cut = _place_to_cut(rest)
        if cut:
            yield _tokenise(context, rest[:cut], tokenizer)
            context, rest = (context + rest[:cut])[-CONTEXT:], rest[cut:]
    if rest:
        yield _tokenise(context, rest, tokenizer)


def token_chunks(pieces: Iterable[np.ndarray], chunk: int, overlap: int = 0) -> Iterator[np.ndarray]:
    """Ids in pieces of any sizes -> ids [chunk + overlap], each starting ``chunk`` after the one before.

    The last is shorter, and left out if nothing but the overlap remains.
    """
    held: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        while count >= chunk + overlap:
            whole = np.concatenate(held)
            yield whole[: chunk + overlap]
            held, count = [whole[chunk:].copy()], count - chunk
    if count > overlap:
        yield np.concatenate(held)


def check_ids(ids: np.ndarray, vocab_size: int | None) -> np.ndarray:
    """The ids. Raises ValueError for one outside the vocabulary."""
    if vocab_size and ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"data: token ids run from {ids.min()} to {ids.max()}, but the vocabulary has {vocab_size}")
    return ids


def _documents(
    sources: Sequence[str], tokenizer: Any, text_field: str | None, piece: int, encoding: str
) -> Iterator[tuple[np.ndarray | Iterable[str], bool]]:
    """Documents, and whether a chat template has written them."""
    for source in sources:
        files = find_sources(source)
        if files is None:
            raise ValueError(f"stream: {source!r} does not exist; give a file or a folder")
        for path in files:
            if path.suffix == ".txt":
                yield text_pieces(path, encoding, piece), False
            elif path.suffix == ".npy":
                yield from ((ids, False) for ids in _read_ids(path, piece))
            else:
                for document in read_file(path, text_field, encoding):
                    templated = isinstance(document, list) and in_own_template(tokenizer)
                    if isinstance(document, list):
                        document = format_chat(document, tokenizer)
                    if isinstance(document, str):
                        yield (document[i : i + piece] for i in range(0, len(document), piece)), templated
                    else:
                        yield document, False


def _read_ids(path: Path, piece: int) -> Iterator[np.ndarray]:
    """By reading, not by mapping: mapped pages would count as resident memory for as long as the file is."""
    with path.open("rb") as file:
        shape, dtype = _read_header(file, path)
        left = int(np.prod(shape))
        while left:
            ids = np.fromfile(file, dtype, min(piece, left))
            if not ids.size:
                raise ValueError(f"stream: {str(path)!r} ends {left} ids before its header says")
            left -= ids.size
            yield ids


def _read_header(file: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, EOFError, TypeError, SyntaxError) as error:  # what a broken header gives
        raise ValueError(f"stream: {str(path)!r} is not an array of token ids: {error}") from error
    if len(shape) not in (1, 2) or not np.issubdtype(dtype, np.integer) or (fortran and len(shape) > 1):
        order = " in Fortran order" if fortran else ""
        raise ValueError(f"stream: {str(path)!r} holds {dtype} {list(shape)}{order}, wanted integer ids [T] or [N, T]")
    return shape, dtype


def _place_to_cut(text: str) -> int:
    """The last place in reach between a letter and a white space, the end of a text without one, 0 if it is short."""
    for i in range(len(text) - 1, max(0, len(text) - REACH), -1):
        if text[i].isspace() and text[i - 1].isalpha():
            return i
    return len(text) if len(text) > REACH else 0


def _tokenise(context: str, text: str, tokenizer: Any) -> np.ndarray:
    fast = getattr(tokenizer, "is_fast", False)
    if not fast:
        return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    both = tokenizer(context + text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    first = bisect.bisect_left(both["offset_mapping"], len(context), key=lambda span: span[0])
    return np.asarray(both["input_ids"][first:], dtype=np.int64)
