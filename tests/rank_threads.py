"""Ranks as threads of one process: an exchange is a barrier, and one graph goes through all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RankThread:
    """What stands for a process group in one of the threads."""

    def __init__(self, rank: int, board: list, barrier: threading.Barrier, turn: threading.Lock) -> None:
        self.at, self.board, self.barrier, self.turn = rank, board, barrier, turn

    def rank(self) -> int:
        return self.at

    def size(self) -> int:
        return len(self.board)

    def gathered(self, sent: dict[str, Tensor]) -> dict[str, Tensor]:
        self.board[self.at] = sent
        self.wait()
        every = list(self.board)
        self.wait()
        assert all(list(x) == list(sent) for x in every)
        return {name: torch.stack([x[name] for x in every]) for name in sent}

    def wait(self) -> None:
        """Until all are here, who compute one after the other: Triton's interpreter knows no threads."""
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


def on_ranks(count: int, run: Callable[[int, RankThread], Any]) -> list:
    """``run(rank, group)`` on so many ranks at once; needs ``threads_as_ranks``."""
    board, found, raised = [None] * count, [None] * count, []
    barrier, turn = threading.Barrier(count), threading.Lock()

    def one(rank):
        with turn:
            try:
                found[rank] = run(rank, RankThread(rank, board, barrier, turn))
            except BaseException as error:
                raised.append(error)
                barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise next((x for x in raised if not isinstance(x, threading.BrokenBarrierError)), raised[0])
    return found


def threads_as_ranks(monkeypatch) -> None:
    """The ops take a ``RankThread`` for a group."""
    from lizard_ops.context_parallel import call, earlier, exchange

    for module in (call, earlier):
        monkeypatch.setattr(module, "process_group", lambda name, group: group)
    for module in (exchange, earlier):
        monkeypatch.setattr(module, "gathered", lambda sent, group: group.gathered(sent))
