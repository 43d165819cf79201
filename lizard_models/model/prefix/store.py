"""The store of states by prefix: memory first, a folder behind it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from lizard_models.model.cache import LizardCache
from lizard_models.model.graphs import outside_inference_mode
from lizard_models.model.prefix.files import Damaged, Prefix, PrefixFiles
from lizard_models.model.prefix.identity import Identities
from lizard_models.model.state_file import tensors_of_cache

logger = logging.get_logger(__name__)

COMPARED = 128  # texts in memory, the last that were used, that a new one is compared with


class PrefixCounts(NamedTuple):
    """What a store has done so far."""

    texts: int = 0  # asked for
    skipped: int = 0  # of which a call was none that a store helps
    found_tokens: int = 0  # not read again
    read_tokens: int = 0
    from_disk: int = 0  # states that came from the folder
    damaged: int = 0  # files that were refused


class PrefixStates:
    """What models remember of the texts they have read: a text that begins like one is read from there on.

    store = PrefixStates(max_bytes=1 << 30, folder="states", max_disk_bytes=10 << 30)
    model.generate(ids, prefix_states=store)  # this call; a pipeline passes it on
    model.prefix_states = store  # every call from now on; prefix_states=False leaves one out

    ``generate`` looks for the longest prefix of its prompt, reads the rest, and keeps three states: after the prompt
    but its last token, after all that was read when the text is written, and where the prompt parts from one that was
    kept before (a system prompt that many share). A state belongs to the weights, config and dtype of a model and to
    its exact tokens, and is used for no other. Copies are in the host's memory.

    max_bytes: of the states in memory; the least recently used go. folder: keeps them on disk too, for other processes
    and later ones, in at most ``max_disk_bytes``. least: tokens of the shortest prefix that is kept. Threads and models
    may share a store, processes a folder on a local disk. Raises ValueError for sizes below 0, ``least`` below 1, and a
    folder on a system without file locks.
    """

    def __init__(
        self,
        max_bytes: int = 1 << 30,
        *,
        folder: str | os.PathLike[str] | None = None,
        max_disk_bytes: int = 10 << 30,
        least: int = 16,
    ) -> None:
        sizes = {"max_bytes": (max_bytes, 0), "max_disk_bytes": (max_disk_bytes, 0), "least": (least, 1)}
        for name, (value, smallest) in sizes.items():
            if value < smallest:
                raise ValueError(f"{name}: got {value}, wanted {smallest} or more")
        self.max_bytes, self.least = max_bytes, least
        self.files = None if folder is None else PrefixFiles(folder, max_disk_bytes)
        self.counts = PrefixCounts()
        self._held: OrderedDict[tuple[str, str], Prefix] = OrderedDict()  # by identity and digest, oldest use first
        self._bytes = 0
        self._lock = threading.Lock()
        self._identities = Identities()

    def longest(self, model: Any, tokens: Tensor) -> tuple[Prefix | None, int]:
        """The longest prefix of ``tokens`` [n] int64 on the CPU that a state stands for, shorter than the text.

        And how many tokens it begins with like one of the last texts in memory. Raises ValueError
        for a model whose weights cannot be summed (``Identities.of``).
        """
        identity = self._identities.of(model)
        lengths = set() if self.files is None else self.files.lengths(identity)
        with self._lock:
            held = [prefix for (owner, _), prefix in self._held.items() if owner == identity]
        common = max((common_start(prefix.tokens, tokens) for prefix in held[-COMPARED:]), default=0)
        lengths |= {len(prefix.tokens) for prefix in held}
        digests = digests_of(tokens, (n for n in lengths if self.least <= n < len(tokens)))
        for n in sorted(digests, reverse=True):
            found = self._find(identity, digests[n], tokens[:n])
            if found is not None:
                return found, common
        return None, common

    def keep(self, model: Any, tokens: Tensor, cache: LizardCache) -> None:
        """Keep what ``cache`` holds after it has read ``tokens`` [n] int64 and no other. Of its rows the first is kept.

        Raises ValueError for a static cache with kept softmax layers, and as ``longest``.
        """
        if len(tokens) < self.least:
            return
        identity, digest = self._identities.of(model), digests_of(tokens, (len(tokens),))[len(tokens)]
        with self._lock:
            known = (identity, digest) in self._held
            if known:
                self._held.move_to_end((identity, digest))
        if known and self.files is None:
            return
        with outside_inference_mode():
            tensors = {name: host_copy(t[:1]) for name, t in tensors_of_cache(cache).items()}
        prefix = Prefix(tokens.clone(), tensors)
        self._hold(identity, digest, prefix)
        if self.files is not None:
            self.files.write(identity, digest, prefix.tokens, prefix.tensors)

    def count(self, **more: int) -> None:
        """Add to ``counts``."""
        with self._lock:
            self.counts = self.counts._replace(**{name: getattr(self.counts, name) + n for name, n in more.items()})

    def nbytes(self) -> int:
        """Bytes of the states in memory."""
        return self._bytes

    def clear(self) -> None:
        """Forget every state, those in the folder as well, and who the models are: their weights are summed again."""
        with self._lock:
            self._held.clear()
            self._bytes = 0
            self._identities = Identities()
        if self.files is not None:
            self.files.clear()

    def __len__(self) -> int:
        return len(self._held)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixStates:
        return self  # a model and its copy may share one

    def __reduce__(self) -> Any:
        files = self.files
        return _empty, (self.max_bytes, files and files.folder, files and files.max_bytes, self.least)

    def _find(self, identity: str, digest: str, tokens: Tensor) -> Prefix | None:
        with self._lock:
            found = self._held.get((identity, digest))
            if found is not None:
                self._held.move_to_end((identity, digest))
        if found is not None or self.files is None:
            return found if found is not None and torch.equal(found.tokens, tokens) else None
        try:
            tensors = self.files.read(identity, digest, tokens)
        except Damaged as error:
            logger.warning(f"a state of a prefix is damaged and was deleted: {error}")
            self.count(damaged=1)
            return None
        if tensors is None:
            return None
        self.count(from_disk=1)
        found = Prefix(tokens.clone(), tensors)
        self._hold(identity, digest, found)
        return found

    def _hold(self, identity: str, digest: str, prefix: Prefix) -> None:
        if prefix.nbytes > self.max_bytes:
            return
        with self._lock:
            before = self._held.pop((identity, digest), None)
            self._bytes += prefix.nbytes - (0 if before is None else before.nbytes)
            self._held[identity, digest] = prefix
            while self._bytes > self.max_bytes:
                self._bytes -= self._held.popitem(last=False)[1].nbytes


def digests_of(tokens: Tensor, lengths: Iterable[int]) -> dict[int, str]:
    """sha256 [hex] of the first n of ``tokens`` [N] int64, for each n of ``lengths``."""
    digest, start, found = hashlib.sha256(), 0, {}
    data = tokens.numpy().astype("<i8", copy=False).tobytes()
    for n in sorted(set(lengths)):
        digest.update(data[8 * start : 8 * n])
        start, found[n] = n, digest.hexdigest()
    return found


def common_start(a: Tensor, b: Tensor) -> int:
    """How many tokens two texts begin with alike."""
    n = min(len(a), len(b))
    other = (a[:n] != b[:n]).nonzero()
    return int(other[0]) if len(other) else n


def host_copy(t: Tensor) -> Tensor:
    """A copy in the host's memory that nobody else writes to."""
    return t.detach().contiguous().cpu() if t.device.type != "cpu" else t.detach().contiguous().clone()


def _empty(max_bytes: int, folder: Any, max_disk_bytes: int | None, least: int) -> PrefixStates:
    if folder is None:
        return PrefixStates(max_bytes, least=least)
    return PrefixStates(max_bytes, folder=folder, max_disk_bytes=max_disk_bytes or 0, least=least)
