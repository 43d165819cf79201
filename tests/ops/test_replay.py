"""Ops launched at once, in the interpreter: a launch of what is compiled runs the kernel on memory found by address."""

from __future__ import annotations

import contextlib
import ctypes
import random
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import DEVICE
from test_hybrid_heads import FORMS, HK, HQ, MERGE, B, D, T, fields, inputs, one_by_one, same
from test_launcher import find_launches
from torch import Tensor

from lizard_ops import hybrid_heads, tuning
from lizard_ops.hybrid_attn import heads

pytest.importorskip("triton")
from lizard_ops.hybrid_attn.triton import heads as triton_heads
from lizard_ops.tiles import calls, launcher, plans, replay

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="launches by address are the GPU's own there")


class Compiled:
    """A kernel as compiled for these arguments."""

    launched: list[str] = []

    def __init__(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.kernel, self.args, self.options = kernel, args, options

    def __call__(self, x: int, y: int, z: int, stream: Any, *values: Any) -> None:
        assert (y, z, stream) == (1, 1, ("stream", -1)) and len(values) == len(self.args)
        self.launched.append(self.kernel.__name__)
        with torch._C.DisableTorchFunction():  # operators of the interpreter's
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
        run = Compiled(kernel, args, options)
        return launcher.Prepared(None, run, (), False, lambda device: ("stream", device)), []

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


REQUIRES = ("q", "k", "v", "query_map", "key_map", "g", "merge_bias")


def gradients(call, given, requires, d_o, **named):
    """Of copies of the tensors given; before them, the output."""
    given = {n: None if x is None else x.detach().requires_grad_(n in requires) for n, x in given.items()}
    o = call(**given, window=3, **named)[0]
    return o.detach(), *torch.autograd.grad(o, [given[n] for n in requires], d_o)


def trained(given, d_o, requires=REQUIRES, calls=4):
    """As many calls with gradients, the first through the ops one by one; the last are launched at once."""
    for _ in range(calls):
        gradients(hybrid_heads, given, requires, d_o, **MERGE)
    (known,) = heads._known.values()
    (plan,) = known._gradients.values()
    assert type(known.recorded.replay) is type(plan.replay) is replay.Replay
    return known, plan


@pytest.mark.parametrize("requires", [REQUIRES, REQUIRES[3:], ("q", "v", "g")], ids=["all", "stage 1", "some"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_bits_of_the_gradients(dtype, form, requires, monkeypatch):
    biased, choices = form != "sum", FORMS[form]
    requires = [n for n in requires if biased or n != "merge_bias"]
    draw = [(inputs(dtype, biased, gates=HQ if form == "sum" else HK), torch.randn(B, T, HQ, D).to(dtype))]
    draw.append(({n: None if x is None else x * 0.5 for n, x in draw[0][0].items()}, draw[0][1] * 2))
    draw[1][0].update({n: x.as_strided(x.shape, draw[0][0][n].stride()) for n, x in draw[0][0].items() if n in "qkv"})
    wanted = [gradients(one_by_one, given, requires, d_o, **choices) for given, d_o in draw]
    found = [gradients(hybrid_heads, *draw[n % 2][:1], requires, draw[n % 2][1], **choices) for n in range(4)]
    for name in ("launches", "gradients"):
        monkeypatch.setattr(f"lizard_ops.hybrid_attn.triton.heads.{name}", pytest.fail)
    found += [gradients(hybrid_heads, *draw[n % 2][:1], requires, draw[n % 2][1], **choices) for n in range(4, 6)]
    for n, tensors in enumerate(found):
        assert same(tensors, wanted[n % 2]), n


@pytest.mark.parametrize("change", ["hook", "tuned", "odd", "strides", "again"])
def test_other_backwards_go_through_the_op(change, stand_ins, monkeypatch):
    given, d_o = inputs(), torch.randn(B, T, HQ, D)
    wanted = gradients(one_by_one, given, REQUIRES, d_o, **MERGE)
    trained(given, d_o)
    calls, op = [], triton_heads.gradients_of
    monkeypatch.setattr(triton_heads, "gradients_of", lambda *a: calls.append(op(*a)) or calls[-1])
    if change == "hook":
        stand_ins.launch_exit_hook.calls.append(print)
    if change == "odd":
        d_o = torch.empty(d_o.numel() + 1)[1:].view(d_o.shape).copy_(d_o)
    if change == "strides":
        d_o = torch.empty(B, T, D, HQ).mT.copy_(d_o)
    with tuning.overriding({}) if change == "tuned" else contextlib.nullcontext():
        for _ in range(2):
            assert same(gradients(hybrid_heads, given, REQUIRES, d_o, **MERGE), wanted)
    assert len(calls) == (0 if change == "again" else 2)


def test_a_graph_that_is_kept_has_its_gradients_twice():
    given, d_o = inputs(), torch.randn(B, T, HQ, D)
    wanted = gradients(one_by_one, given, REQUIRES, d_o, **MERGE)[1:]
    trained(given, d_o)
    leaves = {n: x.detach().requires_grad_(n in REQUIRES) for n, x in given.items()}
    o, _ = hybrid_heads(**leaves, window=3, **MERGE)
    for _ in range(2):
        assert same(torch.autograd.grad(o, [leaves[n] for n in REQUIRES], d_o, retain_graph=True), wanted)
    found = torch.autograd.grad(o, [leaves[n] for n in REQUIRES], d_o, create_graph=True)  # through the operators
    assert same(found, wanted) and all(x.requires_grad for x in found)


def test_what_is_saved_may_have_been_away(monkeypatch):
    given, d_o = inputs(), torch.randn(B, T, HQ, D)
    wanted = gradients(one_by_one, given, REQUIRES, d_o, **MERGE)
    trained(given, d_o)
    monkeypatch.setattr(triton_heads, "gradients", pytest.fail)

    def copied(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)

    with torch.autograd.graph.saved_tensors_hooks(copied, lambda x: x):
        assert same(gradients(hybrid_heads, given, REQUIRES, d_o, **MERGE), wanted)


class Given(NamedTuple):
    x: Tensor
    cos: Tensor | None
    sin: Tensor | None


ANGLES = (torch.ones(8), torch.zeros(8))  # that turn nothing
ELSEWHERE = torch.ones(1, 1, 1, 8)


def turns(between=lambda y: y, returned=lambda given, y, z: z):
    """The plan of an op of two launches, which does something to what the first makes before the second has it, the op
    itself, and what it was called with."""
    plan, calls, kernel = plans.Plan(), [], replay_kernel()

    def launch(name, x, angles, y):
        args = (x, *angles, y, 1, 1, 8, 8, 8, 0, 0, 0, 0)
        named = dict(H=1, HALF=4, BH=1, BD=4, BN=1, BACKWARD=False, num_warps=4)
        plans.launch_planned(plan, name, kernel, (x, *angles, y), lambda: (1, args, named))

    def op(given):
        calls.append(given)
        angles = ANGLES if given.cos is None else given[1:]
        y = given.x.new_empty(1, 1, 1, 8)
        launch("one", given.x, angles, y)
        y = between(y)
        z = given.x.new_empty(1, 1, 1, 8)
        launch("two", y, angles, z)
        return returned(given, y, z)

    return plan, op, calls


def test_a_tensor_that_is_not_given_keeps_an_op_as_it_is():
    plan, op, calls = turns()
    for n in range(6):
        x = torch.randn(1, 1, 1, 8)
        assert torch.equal(replay.replayed(plan, Given(x, None, None), op), x) and len(calls) == n + 1
    assert plan.replay == replay.TRIES


def test_an_op_may_return_what_it_was_given_and_what_it_made():
    plan, op, calls = turns(Tensor.neg, lambda given, y, z: (None, given.x, y, z))
    for _ in range(5):
        x = torch.randn(1, 1, 1, 8)
        nothing, first, second, third = replay.replayed(plan, Given(x, *ANGLES), op)
        assert nothing is None and first is x and torch.equal(second, -x) and torch.equal(third, -x)
    assert len(calls) == 2


@pytest.mark.parametrize("returned", [lambda given, y, z: ELSEWHERE, lambda given, y, z: (z, ELSEWHERE)])
def test_what_comes_from_elsewhere_keeps_an_op_as_it_is(returned):
    plan, op, calls = turns(returned=returned)
    for _ in range(6):
        replay.replayed(plan, Given(torch.randn(1, 1, 1, 8), *ANGLES), op)
    assert len(calls) == 6 and plan.replay == replay.TRIES


@pytest.mark.parametrize(
    "between",
    [
        Tensor.neg, lambda y: y - y.log2(), lambda y: y.view(8).new_zeros(1, 1, 1, 8), lambda y: y.transpose(1, 2),
        lambda y: torch.where(y > 0.0, y / y, 0.0).contiguous(), lambda y: torch.zeros_like(y.view(1, 1, 8, 1).sum(2)),
    ],
)  # fmt: skip
def test_operators_between_launches_are_called_again(between):
    plan, op, calls = turns(between, lambda given, y, z: (y, z))
    for n in range(5):
        x = torch.rand(1, 1, 1, 8) - n % 2
        y, z = replay.replayed(plan, Given(x, *ANGLES), op)
        wanted = between(x)
        assert torch.equal(y.isnan(), wanted.isnan()) and torch.equal(y.nan_to_num(), wanted.nan_to_num())
        assert y.shape != z.shape or torch.equal(z.nan_to_num(), y.nan_to_num())
    assert len(calls) == 2 and type(plan.replay) is replay.Replay


@pytest.mark.parametrize("between", [Tensor.clone, lambda y: y.add_(1), lambda y: y - y.sum().item()])
def test_other_operators_keep_an_op_as_it_is(between):
    plan, op, calls = turns(between)
    for _ in range(6):
        replay.replayed(plan, Given(torch.randn(1, 1, 1, 8), *ANGLES), op)
    assert len(calls) == 6 and plan.replay == replay.TRIES


def test_an_op_with_much_in_between_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 500)
    plan, op, calls = turns()
    for _ in range(6):
        replay.replayed(plan, Given(torch.randn(1, 1, 1, 8), *ANGLES), op)
    assert len(calls) == 6 and plan.replay == replay.TRIES


def test_memory_is_shared_by_what_does_not_live_at_once():
    generator = random.Random(0)
    for _ in range(50):
        lives = []
        for _ in range(generator.randrange(1, 12)):
            first = generator.randrange(10)
            lives.append((generator.randrange(1, 3000), first, first + generator.randrange(4)))
        starts, size = calls.laid_out(lives)
        for n, (a, (bytes_a, *live_a)) in enumerate(zip(starts, lives, strict=True)):
            assert a % calls.UNIT == 0 and a + bytes_a <= size
            for b, (bytes_b, *live_b) in zip(starts[:n], lives, strict=False):
                at_once = live_a[0] <= live_b[1] and live_b[0] <= live_a[1]
                assert not at_once or a + bytes_a <= b or b + bytes_b <= a
    assert calls.laid_out([(700, 0, 1), (600, 1, 2), (1000, 2, 3)]) == ((0, 1024, 0), 2048)


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
