"""What a launch of a known op is given, where addresses have steps behind them and operators stand before it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from test_launcher import Compiled, Kernel, Launcher, stand_ins  # noqa: F401  # the last is a fixture
from torch import Tensor

pytest.importorskip("triton")
from lizard_ops.tiles import plans, replay, table
from lizard_ops.tiles.strided import strided


class Given(NamedTuple):
    x: Tensor


@pytest.mark.parametrize("grouped", [False, True])
def test_addresses_of_what_operators_return(grouped, monkeypatch):
    run, calls, plan = Launcher(grouped), [], plans.Plan()
    monkeypatch.setattr(Compiled, "run", run)
    kernel, empty = Kernel("y", "x", "again", "z", "nothing", "none", "n", "SIZE", "by_name"), torch.empty(0)

    def op(given):
        calls.append(1)
        x, y, z = given.x, given.x.neg(), given.x.new_empty(4)
        args = (strided(y), strided(x), strided(x), z, empty, None, 5)
        tensors = (y, x, x, z, empty, None)
        plans.launch_planned(plan, "one", kernel, tensors, lambda: (3, args, {"SIZE": 2, "by_name": 6}))
        return y, z

    for n in range(5):
        x = torch.randn(1, 2, 2, 4)
        y, z = replay.replayed(plan, Given(x), op)
        assert torch.equal(y, -x) and z.shape == (4,)
        if n:
            steps, found = strided(x)[1:], run.given[-1]
            wanted = ((y.data_ptr(), *steps), *[(x.data_ptr(), *steps)] * 2, z.data_ptr(), 0, None, 5, 2, 6)
            assert found[:4] == (3, 1, 1, ("stream", -1)) and (found[-1] if grouped else found[-9:]) == wanted
    assert len(calls) == 2 and type(plan.replay) is replay.Replay
    assert len(plan.replay.groups) == 1  # x with its steps is made once


def test_a_tensor_without_memory_stands_for_its_kind():
    for x in (torch.empty(2, 3), torch.empty(3, 2).mT, torch.empty(0, 4), torch.empty(5, dtype=torch.bfloat16)):
        like = table.without_memory(x)
        assert like.untyped_storage().nbytes() == 0
        made = torch.empty_like(like)
        assert (made.shape, made.stride(), made.dtype) == (x.shape, x.stride(), x.dtype)
    with torch.inference_mode():
        like = table.without_memory(torch.empty(3))
    assert not like.is_inference()
    assert table.without_memory(torch.empty(2, 3)[:, :2]) is None  # nothing like it is made with gaps
