"""Four processes, and pairs of them, give what one gives; the cases are in ``rank_cases.py``, all run by one start."""

from __future__ import annotations

import pytest
import torch
from rank_cases import CASES, RANKS, main


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(main, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one(failed, case):
    for rank, found in enumerate(failed):
        assert case not in found, f"rank {rank}: {found[case]}"
