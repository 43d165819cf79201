"""Training sequences and evaluation documents: tokenised, packed, shuffled with a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from lizard_models.files.folders import sha256_of
from lizard_models.files.sources import Say, silent
from lizard_models.text.decoding import UTF8, check_encoding
from lizard_models.text.documents import (
    Document,
    find_sources,
    format_chat,
    hub_version,
    in_own_template,
    read_file,
    read_hub,
)
from lizard_models.text.shards import Part, Shards
from lizard_models.text.text_start import text_start, without_start
from lizard_models.text.token_stream import check_ids

STREAM_FROM_BYTES = 1 << 28  # local files beyond this are not held in memory
KEPT_FROM_BYTES = 1 << 20  # of local text whose tokens are kept; less is tokenised as fast as it is looked up
TOKENS = "tokens"  # folder of the cache
TOKENISED_AT_ONCE = 1 << 22  # characters


class TooLittleText(ValueError):
    """Text shorter than one sequence, of so many ``tokens``."""

    def __init__(self, tokens: int, seq_len: int) -> None:
        super().__init__(
            f"data: {tokens} tokens are fewer than one sequence of seq_len={seq_len}; "
            "give more text or a smaller seq_len"
        )
        self.tokens = tokens


class PackedTokens(Dataset):
    """Sequences of ``seq_len`` tokens cut from documents laid end to end, in an order that ``seed`` fixes.

    tokens: ids [T], any integer dtype; the remainder of T / seq_len is dropped. An item is {"input_ids": int64
    [seq_len]}. ``digest`` is the sha256 of the ids. Raises TooLittleText, a ValueError, if there is not one sequence.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, seed: int = 0) -> None:
        count = len(tokens) // seq_len
        if count == 0:
            raise TooLittleText(len(tokens), seq_len)
        self.sequences = tokens[: count * seq_len].reshape(count, seq_len)
        self.order = np.random.default_rng(seed).permutation(count)
        self.digest = hashlib.sha256(np.ascontiguousarray(self.sequences, dtype="<i4").tobytes()).hexdigest()

    sequences: np.ndarray  # [N, seq_len]
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return _item(self.stored(int(self.order[index])))

    def stored(self, place: int) -> np.ndarray:
        """The sequence [seq_len] at a place of the text, whatever the order."""
        return self.sequences[place]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids of the text from start to stop, which may be past its end."""
        return self.sequences.reshape(-1)[start:stop]


class MappedTokens(PackedTokens):
    """The same of text that stays on the disk: ``parts``, ids [T] each, laid end to end.

    keys: what the parts are known by, of which ``digest`` is made. Raises as ``PackedTokens``.
    """

    def __init__(self, parts: Sequence[np.ndarray], keys: Sequence[str], seq_len: int, seed: int = 0) -> None:
        self.parts = [part for part in parts if len(part)]
        self.starts = np.cumsum([0, *map(len, self.parts)])
        self.seq_len, self.count = seq_len, int(self.starts[-1]) // seq_len
        if self.count == 0:
            raise TooLittleText(int(self.starts[-1]), seq_len)
        self.order = np.random.default_rng(seed).permutation(self.count)
        self.digest = hashlib.sha256("\n".join(["parts", *keys]).encode()).hexdigest()

    def stored(self, place: int) -> np.ndarray:
        """As of ``PackedTokens``."""
        return self.tokens(place * self.seq_len, (place + 1) * self.seq_len)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """As of ``PackedTokens``, read from the disk."""
        stop = min(stop, self.count * self.seq_len)
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        found = []
        while start < stop:
            end = min(stop, int(self.starts[first + 1]))
            found.append(self.parts[first][start - self.starts[first] : end - self.starts[first]])
            start, first = end, first + 1
        return np.concatenate(found) if found else np.empty(0, np.int32)


class StreamedTokens(IterableDataset):
    """The same sequences, tokenised while they are read and shuffled in a buffer: for text too large to hold.

    documents: epoch -> token ids of each document. ``digest`` is that of what they are made of (``stream_digest``).
    """

    def __init__(
        self,
        documents: Callable[[int], Iterable[np.ndarray]],
        seq_len: int,
        seed: int = 0,
        buffer: int = 1024,
        digest: str = "",
    ) -> None:
        self.documents, self.seq_len, self.seed, self.buffer, self.digest = documents, seq_len, seed, buffer, digest
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order of the files and of the buffer for every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        draw = np.random.default_rng((self.seed, self.epoch))
        held: list[np.ndarray] = []
        for sequence in self._sequences():
            held.append(sequence)
            if len(held) == self.buffer:
                chosen = int(draw.integers(self.buffer))
                held[chosen], held[-1] = held[-1], held[chosen]
                yield _item(held.pop())
        draw.shuffle(held)
        yield from map(_item, held)

    def _sequences(self) -> Iterator[np.ndarray]:
        rest = np.empty(0, dtype=np.int64)
        for ids in self.documents(self.epoch):
            rest = np.concatenate([rest, ids])
            whole = len(rest) // self.seq_len * self.seq_len
            yield from rest[:whole].reshape(-1, self.seq_len)
            rest = rest[whole:]


class Documents(NamedTuple):
    """Long documents to evaluate on, each row from one document. ``digest`` is the sha256 of the ids."""

    tokens: Tensor  # [N, T] int64
    digest: str


def load_sequences(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    seq_len: int,
    *,
    seed: int = 0,
    text_field: str | None = None,
    examples: int | None = None,
    vocab_size: int | None = None,
    encoding: str = UTF8,
    cache: Path | None = None,
    say: Say = silent,
) -> PackedTokens | StreamedTokens:
    """Training data from files, folders or hub data sets.

    sources: see ``documents.find_sources``; records: see ``documents.document_of``. tokenizer: may be None if every
    source holds token ids. Documents of text begin as the tokenizer begins a text (``text_start``), and an end-of-text
    token is put between them; ids are taken as they are. examples: documents taken at most.
    vocab_size: ids are checked against it (default: the tokenizer's). encoding: of text files and JSON. cache: folder
    for tokens, where local text from 1 MB on, and hub data sets of which ``examples`` are taken, are tokenised once,
    for all later calls (``text.shards``); ``say`` hears of it. Text beyond 256 MB is then read from there. Without
    ``cache``, or from a hub, and without ``examples``, it is streamed.

    Raises ValueError naming the source: missing, unreadable, without text, shorter than one sequence, ids out of range.
    """
    check_encoding(encoding)
    found = [(source, find_sources(source)) for source in sources]
    if not found:
        raise ValueError("data: no source given; wanted files, folders or a hub data set")
    encode = _Encoder(tokenizer, vocab_size)
    local = [path for _, files in found for path in files or []]
    hub = [source for source, files in found if files is None]

    def documents(epoch: int) -> Iterator[Document]:
        order = np.random.default_rng((seed, epoch)).permutation(len(local))
        files = (document for i in order for document in read_file(local[i], text_field, encoding))
        streams = (document for name in hub for document in read_hub(name, text_field))
        return islice(chain(files, streams), examples)

    for name in hub:  # a name or a field that is wrong shows here, not in the middle of a run
        next(read_hub(name, text_field), None)
    size, whole = sum(path.stat().st_size for path in local), examples is None
    kept = None
    if cache is not None:
        kept = Shards(cache / TOKENS, "\n".join(_rules_of(tokenizer, text_field, encoding)), encode, encode.dtype, say)
    if kept is not None and whole and not hub and size > STREAM_FROM_BYTES:
        parts = kept.tokens([_part(path, text_field, encoding) for path in local])
        parts = [parts[i] for i in np.random.default_rng((seed, 0)).permutation(len(local))]
        return MappedTokens([part.ids for part in parts], [part.key for part in parts], seq_len, seed)
    if whole and (hub or size > STREAM_FROM_BYTES):
        digest = stream_digest(local, hub, tokenizer, text_field, encoding)
        return StreamedTokens(lambda epoch: encode(documents(epoch)), seq_len, seed, digest=digest)

    def from_shards(shards: Shards) -> Iterator[np.ndarray]:
        left = examples
        parts = shards.tokens([_part(path, text_field, encoding) for path in local])
        for i in np.random.default_rng((seed, 0)).permutation(len(local)):
            taken = len(parts[i].ends) if left is None else min(left, len(parts[i].ends))
            left = None if left is None else left - taken
            yield parts[i].first(taken)
        for name in hub if left else ():
            assert left is not None  # else it is streamed
            (part,) = shards.tokens([_hub_part(name, text_field, left)])
            left -= len(part.ends)
            yield part.ids

    tokens: list[np.ndarray] | None = None
    if kept is not None and (hub or size >= KEPT_FROM_BYTES) and size <= STREAM_FROM_BYTES:
        try:
            tokens = list(from_shards(kept))
        except OSError as error:
            say(f"note: the tokens are not kept for later runs ({error})")
    tokens = list(encode(documents(0))) if tokens is None else tokens
    return PackedTokens(np.concatenate(tokens) if tokens else np.empty(0, np.int32), seq_len, seed)


def _part(path: Path, text_field: str | None, encoding: str) -> Part:
    version = f"file {path.suffix} {sha256_of(path)}"
    return Part(str(path), version, path.stat().st_size, lambda: read_file(path, text_field, encoding))


def _hub_part(name: str, text_field: str | None, count: int) -> Part:
    version = f"hub {name} {hub_version(name, text_field)}, the first {count}"
    return Part(name, version, 0, lambda: islice(read_hub(name, text_field), count))


def stream_digest(
    local: Sequence[Path],
    hub: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    text_field: str | None,
    encoding: str = UTF8,
) -> str:
    """sha256 of what the tokens of a stream are made of.

    That is every byte of its files in their order, which are read once for it (about a second a gigabyte); the names
    and versions of its hub data sets (``documents.hub_version``); the tokenizer, the field of the text, and its
    encoding if it is not UTF-8.
    """
    parts = [f"file {path.suffix} {sha256_of(path)}" for path in local]
    parts += [f"hub {name} {hub_version(name, text_field)}" for name in hub]
    return hashlib.sha256("\n".join([*parts, *_rules_of(tokenizer, text_field, encoding)]).encode()).hexdigest()


def _rules_of(tokenizer: PreTrainedTokenizerBase | None, text_field: str | None, encoding: str) -> list[str]:
    """What makes ids out of files: field, encoding if it is not UTF-8, tokenizer, end of text, template, and what is
    put before a text, if anything is."""
    parts = [f"field {text_field}"]
    parts += [f"encoding {encoding}"] if encoding != UTF8 else []
    if tokenizer is not None:
        fast = getattr(tokenizer, "backend_tokenizer", None)
        rules = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        parts += [rules, f"end {tokenizer.eos_token_id}", f"template {tokenizer.chat_template}"]
        parts += [f"start {start}"] if (start := text_start(tokenizer)) else []
    return parts


def load_documents(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    *,
    count: int = 8,
    text_field: str | None = None,
    vocab_size: int | None = None,
    encoding: str = UTF8,
) -> Documents:
    """The first ``length`` tokens of the first ``count`` documents that have as many; then their next ones, if needed.

    Text begins as the tokenizer begins one (``text_start``), in the middle of a document too; so do the later parts of
    ids that begin in this way.

    Arguments and errors as in ``load_sequences``; ValueError too if no document is as long as ``length`` tokens.
    """
    check_encoding(encoding)

    def documents(source: str) -> Iterable[Document]:
        files = find_sources(source)
        local = (d for f in files or [] for d in read_file(f, text_field, encoding))
        return read_hub(source, text_field) if files is None else local

    return documents_of(chain.from_iterable(map(documents, sources)), tokenizer, length, count, vocab_size)


def documents_of(
    found: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    count: int = 8,
    vocab_size: int | None = None,
) -> Documents:
    """``load_documents`` of documents that are read already, no more of which are taken than it needs."""
    encode = _Encoder(tokenizer, vocab_size, separate=False)
    long_enough: list[np.ndarray] = []
    longest = 0
    for ids in encode(found, at_once=1):
        longest = max(longest, len(ids))
        if len(ids) >= length:
            long_enough.append(ids)
        if len(long_enough) == count:
            break
    if not long_enough:
        raise ValueError(
            f"eval data: the longest document has {longest} tokens, fewer than {length}; "
            "give longer documents or a smaller eval_length"
        )
    cut = [_windows(ids, length, encode.start) for ids in long_enough]
    windows = (part for parts in zip_longest(*cut) for part in parts if part is not None)
    tokens = np.stack([*islice(windows, count)]).astype(np.int64)
    return Documents(torch.from_numpy(tokens), hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest())


def _windows(ids: np.ndarray, length: int, start: list[int]) -> Iterator[np.ndarray]:
    """Ids [T] in parts of ``length`` ids, each of which begins with ``start`` if they do."""
    text = without_start(ids, start)
    first = ids[: len(ids) - len(text)]
    step = length - len(first)
    for at in range(0, len(text) - step + 1, step):
        yield np.concatenate([first, text[at : at + step]])


class _Encoder:
    """Documents to token ids, checked against the vocabulary."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None, separate: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size or (len(tokenizer) if tokenizer is not None else None)
        self.dtype = np.uint16 if self.vocab_size and self.vocab_size <= 1 << 16 else np.int32
        end = tokenizer.eos_token_id if tokenizer is not None and separate else None
        self.end = [] if end is None else [end]
        self.start = [] if tokenizer is None else text_start(tokenizer)

    def __call__(self, documents: Iterable[Document], at_once: int = TOKENISED_AT_ONCE) -> Iterator[np.ndarray]:
        """at_once: characters that are tokenised together, on as many cores as there are."""
        waiting: list[tuple[str, list[int]]] = []
        characters = 0
        for document in documents:
            start = self.start
            if isinstance(document, list):
                start = [] if in_own_template(self.tokenizer) else start
                document = format_chat(document, self.tokenizer)
            if isinstance(document, str):
                waiting.append((document, start))
                characters += len(document)
                if characters < at_once:
                    continue
            yield from self._tokenise(waiting)
            waiting, characters = [], 0
            if not isinstance(document, str):
                yield self._checked(document)
        yield from self._tokenise(waiting)

    def _tokenise(self, documents: list[tuple[str, list[int]]]) -> Iterator[np.ndarray]:
        """documents: texts, each with the ids that stand before it."""
        if not documents:
            return
        if self.tokenizer is None:
            raise ValueError(
                "data: the model has no tokenizer, so it cannot read text; give token ids (.npy, input_ids)"
            )
        found = self.tokenizer([text for text, _ in documents], add_special_tokens=False, verbose=False)["input_ids"]
        for ids, (_, start) in zip(found, documents, strict=True):
            yield np.array(start + ids + self.end, dtype=self.dtype)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        return check_ids(ids, self.vocab_size).astype(self.dtype)


def _item(sequence: np.ndarray) -> dict[str, Tensor]:
    return {"input_ids": torch.from_numpy(sequence.astype(np.int64))}
