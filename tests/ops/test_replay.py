"""Ops launched at once, in the interpreter: a launch of what is compiled runs the kernel on memory found by address."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import DEVICE
from test_hybrid_heads import FORMS, MERGE, fields, inputs, one_by_one, same
from test_launcher import find_launches
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lizard_ops import hybrid_heads, tuning
from lizard_ops.hybrid_attn import heads

pytest.importorskip("triton")
from lizard_ops.tiles import launcher, plans, replay

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="launches by address are the GPU's own there")


class Compiled:
    """A kernel as compiled for these arguments."""

    launched: list[str] = []

    def __init__(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.kernel, self.args, self.options = kernel, args, options

    def __call__(self, x: int, y: int, z: int, stream: Any, *values: Any) -> None:
        assert (y, z, stream) == (1, 1, ("stream", -1)) and len(values) == len(self.args)
        self.launched.append(self.kernel.__name__)
        with _disable_current_modes():  # operators of the interpreter's
            self.kernel[(x,)](*map(at_address, self.args, values), **self.options)


def at_address(first: Any, value: Any) -> Any:
    """The argument that the first launch was given, at the address of this one."""
    if isinstance(first, Tensor):
        size = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
        assert type(value) is int
        if size == 0:
            return first
        memory = torch.frombuffer((ctypes.c_ubyte * size).from_address(value), dtype=torch.uint8)
        return memory.view(first.dtype)
    if isinstance(first, tuple) and type(value) is tuple:
        return type(first)(*map(at_address, first, value)) if hasattr(first, "_fields") else value
    assert first == value
    return value


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    def prepare(kernel, programs, args, options):
        kernel[(programs,)](*args, **options)
        return launcher.Prepared(
            None, Compiled(kernel, args, options), (), False, lambda device: ("stream", device), ()
        )

    hooks = find_launches(monkeypatch, type(replay_kernel()))
    monkeypatch.setattr(launcher, "prepare", prepare)
    monkeypatch.setattr(heads, "_known", {})
    monkeypatch.setattr(Compiled, "launched", [])
    plans.forget()
    yield hooks
    plans.forget()


def replay_kernel() -> Any:
    from lizard_ops.rotary.triton_op import turn_kernel

    return turn_kernel


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_bits_of_the_ops(form, dtype, monkeypatch):
    draw, choices = [inputs(dtype, biased=form != "sum") for _ in range(2)], FORMS[form]
    for x in draw[1].values():
        None if x is None else x.mul_(0.5)
    wanted = [one_by_one(**given, window=3, **choices)[0] for given in draw]
    assert not torch.equal(*wanted)
    found = [hybrid_heads(**draw[n % 2], window=3, **choices)[0] for n in range(3)]
    (known,) = heads._known.values()
    assert type(known.plan.replay) is replay.Replay and len(known.plan.replay.steps) == 6
    monkeypatch.setattr("lizard_ops.hybrid_attn.triton.heads.launches", pytest.fail)
    found += [hybrid_heads(**draw[n % 2], window=3, **choices)[0] for n in range(3, 6)]
    for n, o in enumerate(found):
        assert torch.equal(o, wanted[n % 2]), n


@torch.no_grad()
def test_maps_that_were_one_may_be_two():
    shared = inputs()
    shared["key_map"] = shared["query_map"]
    apart = shared | {"key_map": shared["query_map"] * 2}
    wanted = one_by_one(**apart, window=3, **MERGE)[0]
    for _ in range(3):
        hybrid_heads(**shared, window=3, **MERGE)
    assert torch.equal(hybrid_heads(**apart, window=3, **MERGE)[0], wanted)
    (known,) = heads._known.values()
    assert type(known.plan.replay) is replay.Replay


@torch.no_grad()
def test_states_and_gradients_have_launches_of_their_own():
    given = inputs()
    wanted = [fields(one_by_one(**given, window=3, output_final_state=final, **MERGE)) for final in (False, True)]
    for _ in range(4):
        for final in (False, True):
            found = fields(hybrid_heads(**given, window=3, output_final_state=final, **MERGE))
            assert same(found, wanted[final])
    with torch.enable_grad():
        given["v"].requires_grad_()
        o = hybrid_heads(**given, window=3, **MERGE)[0]
        assert o.requires_grad and torch.equal(o, wanted[0][0])


class Given(NamedTuple):
    x: Tensor
    y: Tensor | None


def turns(between=lambda y: y):
    """An op of two launches, what it makes of the first between them, and how often it was called."""
    plan, calls = plans.Plan(), []
    kernel = replay_kernel()
    cos, sin = torch.ones(8), torch.zeros(8)

    def launch(name, x, y):
        args = (x, cos, sin, y, 1, 1, 8, 8, 8, 0, 0, 0, 0)
        named = dict(H=1, HALF=4, BH=1, BD=4, BN=1, BACKWARD=False, num_warps=4)
        plans.launch_planned(plan, name, kernel, (x, cos, sin, y), lambda: (1, args, named))

    def op(given):
        calls.append(given)
        y = given.x.new_empty(1, 1, 1, 8)
        launch("one", given.x, y)
        y = between(y)
        z = given.x.new_empty(1, 1, 1, 8)
        launch("two", y, z)
        return z

    return plan, op, calls


def test_a_tensor_that_is_not_given_keeps_an_op_as_it_is():
    plan, op, calls = turns()  # its angles are its own
    for n in range(6):
        x = torch.randn(1, 1, 1, 8)
        assert torch.equal(replay.replayed(plan, Given(x, None), op), x) and len(calls) == n + 1
    assert plan.replay == replay.TRIES


@pytest.mark.parametrize("between", [Tensor.clone, lambda y: y.add_(1)], ids=["copied", "changed"])
def test_operators_between_launches_keep_an_op_as_it_is(between):
    plan, op, calls = turns(between)
    for _ in range(6):
        replay.replayed(plan, Given(torch.randn(1, 1, 1, 8), None), op)
    assert len(calls) == 6 and plan.replay == replay.TRIES


@torch.no_grad()
@pytest.mark.parametrize("change", ["hook", "tuned", "odd"])
def test_other_calls_go_through_the_op(change, stand_ins, monkeypatch):
    given = inputs()
    wanted = one_by_one(**given, window=3, **MERGE)[0]
    for _ in range(3):
        hybrid_heads(**given, window=3, **MERGE)
    (known,) = heads._known.values()
    assert type(known.plan.replay) is replay.Replay
    calls, again = [], replay.again
    monkeypatch.setattr(replay, "again", lambda *a: calls.append(again(*a)) or calls[-1])
    if change == "hook":
        stand_ins.launch_exit_hook.calls.append(print)
    if change == "odd":
        g = torch.empty(given["g"].numel() + 1)[1:].view(given["g"].shape)
        given["g"] = g.copy_(given["g"])
    with tuning.overriding({}) if change == "tuned" else torch.no_grad():
        for _ in range(2):
            assert torch.equal(hybrid_heads(**given, window=3, **MERGE)[0], wanted)
    assert calls and calls[0] is None
