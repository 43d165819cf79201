"""Token ids of files and hub data sets, made once: shards in the cache, mapped into memory, with a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lizard_models.files.folders import appear_whole, check_space, sha256_of
from lizard_models.files.locks import try_lock
from lizard_models.files.records import read_json, seal_broken, sealed
from lizard_models.files.sources import Say, silent
from lizard_models.text.documents import Document

FORM = 1  # of a shard's files and of what its key is made of
SHARD_BYTES = 64 << 20  # of text, in one shard; a larger file is one by itself
MANIFEST, IDS, ENDS = "manifest.json", "ids.bin", "ends.bin"
WAIT = 0.2  # seconds between looks at a lock


class Part(NamedTuple):
    """What is tokenised in one piece: a file, or a hub data set."""

    name: str
    version: str  # changes with what it holds
    bytes: int
    read: Callable[[], Iterable[Document]]


class PartTokens(NamedTuple):
    """The token ids [T] of a part, and where each of its documents ends, int64 [D]; ``key`` says whose they are."""

    ids: np.ndarray
    ends: np.ndarray
    key: str

    def first(self, documents: int) -> np.ndarray:
        """The ids of as many documents."""
        return self.ids[: self.ends[documents - 1]] if documents else self.ids[:0]


class Shards:
    """Reads parts from the cache, and makes what it lacks.

    folder: of all shards. rules: digest of what makes ids out of documents besides the parts: tokenizer, end of text,
    template, field, encoding. encode: documents -> ids of each, of ``dtype``. A shard is a folder named by the sha256
    of ``rules``, ``dtype`` and its parts' versions, so that another tokenizer, option or file is another shard; names
    and times of files say nothing. It appears whole; a process that finds another one making it waits. One that is
    damaged is told of and made again.
    """

    def __init__(
        self,
        folder: Path,
        rules: str,
        encode: Callable[[Iterable[Document]], Iterator[np.ndarray]],
        dtype: Any,
        say: Say = silent,
    ) -> None:
        self.folder, self.rules, self.encode, self.dtype, self.say = folder, rules, encode, np.dtype(dtype), say

    def tokens(self, parts: Sequence[Part]) -> list[PartTokens]:
        """The tokens of each part, in their order. Raises ValueError for a disk too small, and what reading parts does;
        OSError for a cache that cannot be written."""
        found: list[PartTokens] = []
        for group in _groups(parts):
            key = self._key(group)
            target = self.folder / key
            known = self._read(target, group)
            if known is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with _alone(self.folder / f".{key}.lock", self.say):
                    known = self._read(target, group) or self._make(target, group)
            found += known
        return found

    def _key(self, group: Sequence[Part]) -> str:
        told = [f"form {FORM}", self.rules, self.dtype.str, *(part.version for part in group)]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]

    def _read(self, target: Path, group: Sequence[Part]) -> list[PartTokens] | None:
        """The shard's tokens, None if it is not there; one that is damaged goes."""
        if not target.is_dir():
            return None
        try:
            return self._checked(target, group)
        except (ValueError, OSError, TypeError, KeyError) as error:
            self.say(f"note: tokens in {str(target)!r} are damaged ({error}), and made again")
            gone = target.with_name(f".{target.name}.gone{os.getpid()}")
            target.rename(gone)
            for path in gone.iterdir():
                path.unlink()
            gone.rmdir()
            return None

    def _checked(self, target: Path, group: Sequence[Part]) -> list[PartTokens]:
        manifest: Any = read_json(target / MANIFEST, "it is made again")
        if seal_broken(manifest) or manifest["parts_of"] != [part.version for part in group]:
            raise ValueError(f"{MANIFEST} is not what was written")
        for name in (IDS, ENDS):
            if sha256_of(target / name) != manifest[f"{name}_sha256"]:
                raise ValueError(f"{name} is not what was written")
        ids = _mapped(target / IDS, np.dtype(manifest["dtype"]))
        ends = _mapped(target / ENDS, np.dtype("<i8"))
        found, at, document = [], 0, 0
        for number, (tokens, documents) in enumerate(manifest["counts"]):
            here = ends[document : document + documents] - at
            found.append(PartTokens(ids[at : at + tokens], here, f"{target.name} {number}"))
            at, document = at + tokens, document + documents
        return found

    def _make(self, target: Path, group: Sequence[Part]) -> list[PartTokens]:
        size = sum(part.bytes for part in group)
        if size > SHARD_BYTES:
            check_space(self.folder, size * self.dtype.itemsize, "the tokens of the text", "cache")
        self.say(f"tokenizing, once: {group[0].name}" + (f" and {len(group) - 1} more files" if len(group) > 1 else ""))
        documents = [0] * len(group)

        def read() -> Iterator[Document]:
            for number, part in enumerate(group):
                for document in part.read():
                    documents[number] += 1
                    yield document

        with appear_whole(target) as draft:
            at, ends = 0, [0]
            with (draft / IDS).open("wb") as file:
                for ids in self.encode(read()):
                    file.write(ids.astype(self.dtype, copy=False).tobytes())
                    at += len(ids)
                    ends.append(at)
            np.asarray(ends[1:], dtype="<i8").tofile(draft / ENDS)
            last = np.cumsum([0, *documents])
            counts = [(ends[b] - ends[a], int(b - a)) for a, b in zip(last, last[1:], strict=False)]
            manifest = {
                "form": FORM,
                "rules_sha256": hashlib.sha256(self.rules.encode()).hexdigest(),
                "dtype": self.dtype.str,
                "tokens": at,
                "documents": len(ends) - 1,
                "parts": [part.name for part in group],
                "parts_of": [part.version for part in group],
                "counts": counts,  # tokens and documents of each part
                f"{IDS}_sha256": sha256_of(draft / IDS),
                f"{ENDS}_sha256": sha256_of(draft / ENDS),
            }
            (draft / MANIFEST).write_text(json.dumps(sealed(json.loads(json.dumps(manifest))), indent=1) + "\n")
        return self._checked(target, group)


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Neighbours together, up to ``SHARD_BYTES``: a file that changes costs its own shard alone."""
    group: list[Part] = []
    for part in parts:
        if group and sum(each.bytes for each in group) + part.bytes > SHARD_BYTES:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(f"{path.name} is cut short")
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)


@contextlib.contextmanager
def _alone(lock: Path, say: Say) -> Iterator[None]:
    """Waits until no other process is within; where the disk has no locks, nobody waits."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if try_lock(descriptor) is False:
            say("waiting for another process that tokenizes the same text")
            while try_lock(descriptor) is False:
                time.sleep(WAIT)
        yield
    finally:
        lock.unlink(missing_ok=True)  # who waits for it goes on; should a third one begin, both make the same
        os.close(descriptor)
