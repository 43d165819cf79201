"""Four processes, and pairs of them, give what one gives; the cases are in ``rank_cases.py``, all run by one start."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as processes
from rank_cases import CASES, RANKS, main


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    imported = ["torch", "torch.distributed.device_mesh", "torch._dynamo", "hypothesis.strategies", "lizard_ops"]
    processes.get_context("forkserver").set_forkserver_preload(imported)  # once, not by each of the four
    processes.start_processes(main, (str(folder),), nprocs=RANKS, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one(failed, case):
    for rank, found in enumerate(failed):
        assert case not in found, f"rank {rank}: {found[case]}"
