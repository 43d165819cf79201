"""Streamed training data as the one long pass that Trainer can go on in."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import Dataset, IterableDataset


class EndlessStream(IterableDataset):
    """A stream, epoch after epoch, without an end; every epoch in the order that its ``set_epoch`` gives.

    Trainer knows the length of no stream, so it takes all its steps for one epoch: a resumed run skips, from the start
    of epoch 0, as many batches as were trained. In a stream with an end that is another item wherever an epoch ended
    before. A batch at the end of an epoch is filled up from the next.

    Raises ValueError where an epoch gives nothing.
    """

    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset: Any = dataset

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            empty = True
            for item in self.dataset:
                empty = False
                yield item
            if empty and epoch:
                raise ValueError(
                    f"data: the stream gave nothing in epoch {epoch}; wanted data to read again, or fewer steps"
                )
            if empty:
                raise ValueError("data: the stream gave nothing; wanted text for at least one sequence")


def endless(dataset: Dataset) -> Dataset:
    """``dataset`` itself, or its ``EndlessStream`` if it is a stream."""
    return EndlessStream(dataset) if isinstance(dataset, IterableDataset) else dataset
