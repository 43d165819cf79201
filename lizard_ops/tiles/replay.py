"""Ops of which every launch is known: addresses are filled in, and what launches hand one another lies in one memory.

Nothing of what an op does around its launches is done again: sizes, views, the functions between. Operators of PyTorch
that stand between launches are called as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lizard_ops import tuning
from lizard_ops.tiles import launcher
from lizard_ops.tiles.calls import Call, Calls, laid_out
from lizard_ops.tiles.launcher import Prepared, is_hooked
from lizard_ops.tiles.plans import Bound, Plan

SEVERAL = (tuple, list)
TRIES = 3  # another thread's launches may have been in between
Found = TypeVar("Found", Tensor, tuple[Tensor | None, ...])


class Launch(NamedTuple):
    """A launch."""

    prepared: Prepared
    programs: int
    values: list[Any]
    fills: list[tuple[int, int, tuple[Any, ...] | None]]  # an argument, which address it is, what stands behind it


class Operator(NamedTuple):
    """A function of PyTorch."""

    function: Callable[..., Any]
    values: list[Any]
    fills: list[tuple[int, int]]  # an argument, which tensor it is
    named: dict[str, Any]


class Replay(NamedTuple):
    """The steps of an op. Its tensors: those given, those made one by one, None, what operators return. Its addresses:
    those of tensors given and made, of places in the memory in between, of what operators return."""

    device: int
    where: torch.device
    used: tuple[int, ...]  # of the tensors given
    made: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    size: int  # bytes of the memory in between
    offsets: tuple[int, ...]
    stream_of: Any
    steps: tuple[Launch | Operator, ...]
    outputs: Any  # of the list of tensors


def replayed(plan: Plan, tensors: Any, op: Callable[[Any], Found]) -> Found:
    """``op(tensors)``, a tensor or a tuple of tensors and None, launched at once where a call of its kind has been
    noted.

    plan: that of all launches of the op, which is called with tensors of the same shapes, strides, dtypes and devices,
    records no gradient and has nobody looking. tensors: a NamedTuple of tensors and None.
    """
    replay = plan.replay
    if type(replay) is Replay:
        found = again(plan, replay, tensors)
        return op(tensors) if found is None else found
    known = replay < TRIES and plan and all(type(bound) is Bound for bound in plan.values())
    return note(plan, tensors, op, replay) if known and not is_hooked() else op(tensors)


def again(plan: Plan, replay: Replay, tensors: Sequence[Any]) -> Any:
    """What the op returns; None where this call is to go through it."""
    device, where, used, made, size, offsets, stream_of, steps, outputs = replay
    if plan.tuned is not tuning.active() or is_hooked() or (device >= 0 and device != torch._C._cuda_getDevice()):
        return None
    there, addresses, low = [], [], 0
    for i in used:
        x = tensors[i]
        address = x.data_ptr()
        low |= address
        there.append(x)
        addresses.append(address)
    if low & 15:
        return None
    for shape, strides, dtype in made:
        x = torch.empty_strided(shape, strides, dtype=dtype, device=where)
        there.append(x)
        addresses.append(x.data_ptr())
    there.append(None)
    if size:
        memory = torch.empty_strided((size,), (1,), dtype=torch.uint8, device=where)
        start = memory.data_ptr()
        for offset in offsets:
            addresses.append(start + offset)  # noqa: PERF401  # a comprehension is a function before Python 3.12
    stream = stream_of(device)
    for step in steps:
        if type(step) is Launch:
            (_, run, fixed, grouped, _), programs, known, fills = step
            values = known.copy()
            for i, which, behind in fills:  # type: ignore[misc]
                values[i] = addresses[which] if behind is None else (addresses[which], *behind)
            run(programs, 1, 1, stream, *fixed, *(((*values,),) if grouped else values))
        else:
            function, known, fills, named = step
            values = known.copy()
            for i, which in fills:  # type: ignore[misc]
                values[i] = there[which]
            x = function(*values, **named)
            for y in x if type(x) in SEVERAL else (x,):
                there.append(y)
                addresses.append(y.data_ptr())
    return outputs(there)


def note(plan: Plan, tensors: Any, op: Callable[[Any], Found], tries: int) -> Found:
    """``op(tensors)``; leaves a ``Replay`` in the plan where all that it does is to allocate, to launch and to call
    operators that are known to depend on nothing else. tries: how often it could not."""
    seen: set[int] = set()
    apart = []  # each its own object, to be told from the others, which it may be the same as in this call alone
    for x in tensors:
        apart.append(x.view_as(x) if x is not None and id(x) in seen else x)
        seen.add(id(x))
    names, before = set(plan), launcher.unplanned()
    plan.noted = noted = []  # another thread may note its own call in its place
    try:
        with Calls(noted) as calls:
            found = op(type(tensors)(*apart))
    finally:
        plan.noted = None
    launched = [step[0] for step in noted if type(step) is not Call]
    replay = None
    if launcher.unplanned() == before and not calls.others and len(launched) == len(names) and {*launched} == names:
        replay = replay_of(noted, apart, calls.made, found)
    plan.replay = tries + 1 if replay is None else replay
    return found


def replay_of(
    noted: Sequence[Any], given: Sequence[Tensor | None], made: Sequence[Tensor], found: Any
) -> Replay | None:
    """The steps noted, launches and ``Call``s, of an op that was given these tensors, made those and returned what it
    found; None where a step or the caller has another."""
    outputs = list(found) if isinstance(found, tuple) else [found]
    wanted = {id(x) for x in outputs} | {id(x) for step in noted if type(step) is Call for x in step.args}
    base = {  # of views that only launches have: what they are of
        id(step.results[0]): x
        for step in noted
        if type(step) is Call and id(step.results[0]) not in wanted and (x := step.first) is not None
    }
    noted = [step for step in noted if type(step) is not Call or id(step.results[0]) not in base]
    wanted = {id(x) for x in outputs} | {id(x) for step in noted if type(step) is Call for x in step.args}
    lives: dict[int, tuple[int, int]] = {}  # of what is made: the first launch that has it, and the last
    for n, step in enumerate(noted):
        for x in () if type(step) is Call else step[2]:
            x = base.get(id(x), x)
            lives[id(x)] = lives.get(id(x), (n, n))[0], n
    used = tuple(i for i, x in enumerate(given) if x is not None)
    objects = [x for x in made if id(x) in wanted]
    between = [x for x in made if id(x) not in wanted and id(x) in lives and x.numel()]
    offsets, size = laid_out([(x.untyped_storage().nbytes(), *lives[id(x)]) for x in between])
    at_hand: list[Any] = [*(given[i] for i in used), *objects]
    results = [x for step in noted if type(step) is Call for x in step.results]
    tensor_at = {id(x): n for n, x in enumerate([*at_hand, None, *results])}
    address_at = {id(x): n for n, x in enumerate([*at_hand, *between, *results])}
    steps = [
        operator_of(step, tensor_at) if type(step) is Call else launch_of(step, address_at, base) for step in noted
    ]
    devices, picked = (
        {step[1].device for step in noted if type(step) is not Call},
        [tensor_at.get(id(x)) for x in outputs],
    )
    if (
        len(devices) != 1
        or not used
        or None in steps
        or None in picked
        or (isinstance(found, tuple) and len(found) < 2)
    ):
        return None
    kinds = tuple((x.shape, x.stride(), x.dtype) for x in objects)
    stream_of = next(step.prepared.stream_of for step in steps if type(step) is Launch)
    pick: Any = itemgetter(*picked)
    return Replay(devices.pop(), at_hand[0].device, used, kinds, size, offsets, stream_of, tuple(steps), pick)  # type: ignore[arg-type]


def operator_of(call: Call, tensor_at: dict[int, int]) -> Operator | None:
    """tensor_at: where tensors are. None where one is elsewhere."""
    fills = [(i, tensor_at.get(id(x))) for i, x in enumerate(call.args) if isinstance(x, Tensor)]
    others: list[Any] = [None if isinstance(x, Tensor) else x for x in call.args]
    inside = [y for x in others if isinstance(x, (tuple, list)) for y in x] + list(call.named.values())
    if any(which is None for _, which in fills) or any(isinstance(x, Tensor) for x in inside):
        return None
    return Operator(call.function, others, fills, call.named)  # type: ignore[arg-type]


def launch_of(step: tuple[str, Bound, Sequence[Tensor | None]], address_at: dict[int, int], base: Any) -> Launch | None:
    """address_at: where addresses are. base: of views. None where a tensor is elsewhere."""
    _, bound, tensors = step
    values, fills = bound.values.copy(), []
    for (i, behind), x in zip(bound.places, (x for x in tensors if x is not None), strict=True):
        if x.numel() == 0:
            values[i] = 0 if behind is None else (0, *behind)
        elif (which := address_at.get(id(base.get(id(x), x)))) is None:
            return None
        else:
            fills.append((i, which, behind))
    return Launch(bound.prepared, bound.programs, values, fills)
