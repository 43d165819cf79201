"""States of prefixes on disk: a folder that several processes write to, of bounded size."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from lizard_models.files.sources import expanded
from lizard_models.model.state_file import checksum

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT, VERSION = "lizard-attn prefix state", "1"
ENDING = ".prefix"
TOKENS = "tokens"


class Damaged(ValueError):
    """A file that is not what its name says."""


class PrefixFiles:
    """One file a prefix: ``<identity>/<length>-<digest of its tokens>.prefix``.

    A file appears whole or not at all, under a lock that ends with its process, however that ends. All files of the
    folder together are never larger than ``max_bytes``; those that were used longest ago go first. Files are read
    without a lock: each names its model, and holds its tokens and a checksum of all.

    Raises ValueError for a system without file locks.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if fcntl is None:
            raise ValueError("folder: this system has no fcntl, whose locks keep processes apart: leave it out")
        self.folder, self.max_bytes = expanded(folder, "folder"), max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)

    def lengths(self, identity: str) -> set[int]:
        """Lengths of the prefixes that there are of a model."""
        try:
            names = os.listdir(self.folder / identity)
        except FileNotFoundError:
            return set()
        starts = (name.partition("-")[0] for name in names if name.endswith(ENDING))
        return {int(start) for start in starts if start.isdigit()}

    def read(self, identity: str, digest: str, tokens: Tensor) -> dict[str, Tensor] | None:
        """The tensors of the state after ``tokens`` [n] int64; None where there is no file.

        Raises Damaged where the file is not what it should be, and takes it away.
        """
        path = self._path(identity, digest, len(tokens))
        try:
            data = (
                path.read_bytes()
            )  # at once: safe_open opens a file twice, and another process may replace it between
            os.utime(path)
        except FileNotFoundError:
            return None
        try:
            tensors, header = load(data), int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + header]).get("__metadata__")
        except (SafetensorError, ValueError) as error:
            path.unlink(missing_ok=True)
            raise Damaged(f"{path}: {error}") from error
        wanted = {"format": FORMAT, "version": VERSION, "identity": identity, "data": checksum(sorted(tensors.items()))}
        if metadata != wanted or TOKENS not in tensors or not torch.equal(tensors.pop(TOKENS), tokens):
            path.unlink(missing_ok=True)
            raise Damaged(f"{path} does not hold what its checksum and its name say")
        return tensors

    def write(self, identity: str, digest: str, tokens: Tensor, tensors: dict[str, Tensor]) -> bool:
        """Keep the state after ``tokens``. False where it alone is larger than all files may be."""
        path = self._path(identity, digest, len(tokens))
        held = tensors | {TOKENS: tokens}
        sums = checksum(sorted(held.items()))
        metadata = {"format": FORMAT, "version": VERSION, "identity": identity, "data": sums}
        room = sum(t.nbytes for t in held.values()) + 256 * len(held) + 4096  # a header's line each, generously
        if room > self.max_bytes:
            return False
        with self._locked():
            if path.exists():
                os.utime(path)
                return True
            self._make_room(room)
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name("partial")
            save_file(held, partial, metadata)
            partial.replace(path)
        return True

    def size(self) -> int:
        """Bytes of all files at a moment when nobody writes one."""
        with self._locked():
            return sum(size for _, size, _ in self._files())

    def clear(self) -> None:
        """Delete every prefix, those of other models and processes too."""
        with self._locked():
            for _, _, path in self._files():
                path.unlink(missing_ok=True)

    def _path(self, identity: str, digest: str, length: int) -> Path:
        return self.folder / identity / f"{length}-{digest}{ENDING}"

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of what is there; "partial" is a file that another process died over."""
        found = []
        for path in self.folder.glob("*/*"):
            if path.suffix == ENDING or path.name == "partial":
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _make_room(self, room: int) -> None:
        """Delete what was not used for longest until ``room`` bytes are free. Under the lock."""
        files = sorted(self._files())
        held = sum(size for _, size, _ in files)
        for _, size, path in files:
            if path.name == "partial" or held + room > self.max_bytes:
                path.unlink(missing_ok=True)
                held -= size

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Prefix(NamedTuple):
    """A state in memory, and the tokens it has read."""

    tokens: Tensor  # [n] int64
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(t.nbytes for t in self.tensors.values())
