"""Launches that are found again: without a GPU the compiled kernel is a stand-in that says what it was given."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lizard_ops import tuning

pytest.importorskip("triton")
from lizard_ops.tiles import launcher, plans
from lizard_ops.tiles.strided import strided


class Compiled:
    """What Triton would have made."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.function, self.packed_metadata = kernel, 7, "metadata"

    def run(self, *given: Any) -> None:
        self.kernel.at_once.append(given)


class Kernel:
    """A kernel whose launches by Triton are in ``by_triton``, those of what it has compiled in ``at_once``."""

    def __init__(self, *names: str) -> None:
        self.arg_names = list(names)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.signature = inspect.Signature([inspect.Parameter(name, kind, default=None) for name in names])
        self.by_triton: list[Any] = []
        self.at_once: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Compiled:
            self.by_triton.append((grid, args, options))
            return Compiled(self)

        return run


def find_launches(monkeypatch, kind: type) -> SimpleNamespace:
    """Has launches of kernels of this kind found again, and returns Triton's hooks, at which nobody stands."""
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[]))
    for module in (launcher, plans):
        monkeypatch.setattr(module, "JITFunction", kind)
    monkeypatch.setattr(launcher, "TAKES_ADDRESSES", True)
    monkeypatch.setattr(launcher, "TURNED_OFF", False)
    monkeypatch.setattr(launcher, "RUNTIME", hooks)
    return hooks


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    hooks = find_launches(monkeypatch, Kernel)
    monkeypatch.setattr(launcher, "CompiledKernel", Compiled)
    streams = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: ("stream", device)))
    monkeypatch.setattr(launcher, "driver", streams)
    plans.forget()
    yield hooks
    plans.forget()


def both(kernel: Kernel) -> tuple[int, int]:
    """Launches by Triton, and of what is compiled."""
    return len(kernel.by_triton), len(kernel.at_once)


def test_the_second_launch_of_a_kind_goes_to_the_compiled_kernel():
    kernel, x = Kernel("x", "rows", "of_heads", "last", "SIZE", "first"), torch.ones(1, 3, 4, 8)
    given = (x, 5, strided(x[:, 1:]), None)
    for programs in (2, 3):
        launcher.launch_kernel(kernel, programs, *given, first=9, SIZE=16, num_warps=4)
    assert kernel.by_triton == [((2,), given, {"first": 9, "SIZE": 16, "num_warps": 4})]
    steps = strided(x)[1:]
    (found,) = kernel.at_once
    of_heads = (x[:, 1:].data_ptr(), *steps)
    start = (3, 1, 1, ("stream", -1), 7, "metadata", None, None, None)
    assert found == (*start, x.data_ptr(), 5, of_heads, None, 16, 9)


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(4), 6),  # another number
        (torch.ones(4), True),  # of another type, though it is equal
        (torch.ones(4), 1.0),
        (torch.ones(4).half(), 1),
        (torch.ones(5)[1:], 1),  # at an address that 16 does not divide
        (None, 1),
        ((torch.ones(4), torch.ones(4)), 1),
    ],
)
def test_another_kind_is_launched_by_triton(other):
    kernel = Kernel("x", "n", "SIZE")
    launcher.launch_kernel(kernel, 1, torch.ones(4), 1, SIZE=1)
    launcher.launch_kernel(kernel, 1, *other, SIZE=1)
    assert both(kernel) == (2, 0)
    launcher.launch_kernel(kernel, 1, *other, SIZE=1)
    assert both(kernel) == (2, 1)
    launcher.launch_kernel(kernel, 1, torch.ones(4), 1, SIZE=True)
    launcher.launch_kernel(kernel, 1, torch.ones(4), 1, SIZE=1, num_warps=2)
    launcher.launch_kernel(Kernel("x", "n", "SIZE"), 1, torch.ones(4), 1, SIZE=1)
    assert both(kernel) == (4, 1)


def test_a_hook_sees_every_launch(stand_ins):
    kernel, x, plan = Kernel("x"), torch.ones(4), plans.Plan()
    for _ in range(3):
        launcher.launch_kernel(kernel, 1, x)
        plans.launch_planned(plan, "one", kernel, (x,), lambda: (1, (x,), {}))
    stand_ins.launch_exit_hook.calls.append(print)
    before = both(kernel)
    launcher.launch_kernel(kernel, 1, x)
    plans.launch_planned(plan, "one", kernel, (x,), lambda: (1, (x,), {}))
    stand_ins.launch_exit_hook = print  # in place of the chain
    launcher.launch_kernel(kernel, 1, x)
    assert both(kernel) == (before[0] + 3, before[1])


def test_what_has_not_been_compiled_is_launched_by_triton(monkeypatch):
    monkeypatch.setattr(launcher, "CompiledKernel", str)
    kernel = Kernel("x")
    for _ in range(2):
        launcher.launch_kernel(kernel, 1, torch.ones(4))
    assert both(kernel) == (2, 0)


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(launcher, "MOST", 2)
    kernel = Kernel("x", "n")
    for n in range(5):
        launcher.launch_kernel(kernel, 1, torch.ones(4), n)
    assert len(launcher._known) <= 2


def test_a_planned_launch_takes_the_memory_of_its_tensors_alone():
    kernel, plan, asked = Kernel("x", "n", "heads", "SIZE"), plans.Plan(), []

    def call(x, heads):
        def arguments():
            asked.append(x)
            return 2, (x, len(asked), strided(heads)), {"SIZE": 3, "num_warps": 1}

        plans.launch_planned(plan, "one", kernel, (x, None, heads), arguments)

    pairs = [(torch.ones(4), torch.ones(1, 2, 2, 4)) for _ in range(3)]
    for pair in pairs:
        call(*pair)
    assert len(asked) == 1 and both(kernel) == (1, 2)
    x, heads = pairs[2]
    of_heads = (heads.data_ptr(), *strided(heads)[1:])
    assert kernel.at_once[1][9:] == (x.data_ptr(), 1, of_heads, 3) and kernel.at_once[1][0] == 2
    call(torch.ones(5)[1:], heads)  # no address of the kind that the kernel was compiled for
    assert len(asked) == 2 and both(kernel) == (2, 2)
    with tuning.overriding({}):
        call(*pairs[0])
    call(*pairs[0])
    assert len(asked) == 4
    call(*pairs[0])
    assert len(asked) == 4


@pytest.mark.parametrize("kind", ["copied", "within", "odd"])
def test_launches_that_cannot_be_planned(kind):
    kernel, plan = Kernel("x"), plans.Plan()
    x = torch.ones(5)[1:] if kind == "odd" else torch.ones(4)
    other = {"copied": x.clone(), "within": (x, 1), "odd": x}[kind]
    for _ in range(3):
        plans.launch_planned(plan, "one", kernel, (x,), lambda: (1, (other,), {}))
    assert plan["one"] is plans.UNBOUND
    assert both(kernel) == (2, 1)


@pytest.mark.parametrize("changed", ["number", "programs", "option", "dtype", "tensor"])
def test_the_interpreter_finds_a_plan_that_does_not_hold(changed, monkeypatch):
    for module in (launcher, plans):
        monkeypatch.setattr(module, "JITFunction", str)  # no kernel here is compiled
    kernel, plan, x = Kernel("x", "n", "SIZE"), plans.Plan(), torch.ones(4)
    call = {"programs": 1, "x": x, "n": 1, "SIZE": 2, "named": x}

    def launch(programs, x, n, SIZE, named):  # noqa: N803
        plans.launch_planned(plan, "one", kernel, (named,), lambda: (programs, (x, n), {"SIZE": SIZE}))

    launch(**call)
    other = torch.ones(4)
    launch(**call | {"x": other, "named": other})
    change = {
        "number": {"n": 2}, "programs": {"programs": 2}, "option": {"SIZE": 3}, "tensor": {"named": other},
        "dtype": {"x": x.half(), "named": x.half()},
    }[changed]  # fmt: skip
    with pytest.raises(AssertionError, match="one: a plan's launch"):
        launch(**call | change)


class Launcher:
    """Triton's, of which two versions hand arguments on in two ways."""

    def __init__(self, grouped: bool, **sizes: int) -> None:
        self.grouped, self.given = grouped, []
        self.global_scratch_size, self.profile_scratch_size = sizes.get("scratch", 0), 0
        self.launch = self.given.append if sizes.get("scratch") else lambda *given: self.given.append(given)

    def __call__(self, x, y, z, stream, function, *rest):
        between = (function, "cooperative", *rest[:4])
        args = (rest[4:],) if self.grouped else rest[4:]
        self.launch(x, y, z, stream, *between, *args)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_launchers_own_function_is_called(grouped, monkeypatch):
    kernel, run = Kernel("x", "n", "SIZE"), Launcher(grouped)
    monkeypatch.setattr(Compiled, "run", run)
    x = torch.ones(4)
    for _ in range(2):
        launcher.launch_kernel(kernel, 3, x, 1, SIZE=2)
    (found,), ((prepared, _),) = run.given, launcher._known.values()
    assert prepared.run is run.launch
    del run.given[:]
    run(3, 1, 1, ("stream", -1), 7, "metadata", None, None, None, x.data_ptr(), 1, 2)
    assert run.given == [found]


def test_a_launcher_that_hands_out_memory_is_called_itself():
    run = Launcher(False, scratch=16)
    assert launcher.straight(run, (7,)) == (run, (7,), False) and not run.given


def test_launches_that_are_turned_off_are_tritons(monkeypatch):
    monkeypatch.setattr(launcher, "TURNED_OFF", True)
    kernel, plan, x = Kernel("x"), plans.Plan(), torch.ones(4)
    for _ in range(3):
        launcher.launch_kernel(kernel, 1, x)
        plans.launch_planned(plan, "one", kernel, (x,), lambda: (1, (x,), {}))
    assert not kernel.at_once
