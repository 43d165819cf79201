"""Launches that are known but for the memory of their tensors: those of a kind of call that comes again.

Nothing is looked at then but addresses, and the arguments are not even made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime.jit import JITFunction

from lizard_ops import tuning
from lizard_ops.tiles import launcher
from lizard_ops.tiles.launcher import ODD, Prepared, is_hooked, launch_kernel, within
from lizard_ops.tiles.strided import Strided

Arguments = tuple[int, tuple[Any, ...], dict[str, Any]]  # programs, arguments in order, those by name with options
UNBOUND = object()  # stands where a launch cannot be known beforehand


class Bound(NamedTuple):
    """A launch of which all but the tensors is known."""

    prepared: Prepared
    programs: int
    device: int
    values: list[Any]
    places: list[tuple[int, tuple[Any, ...] | None]]  # of each tensor: which argument, and what stands behind it there
    whole: bool  # whether a caller's tensors have no None among them


class Plan(dict[str, Any]):
    """The launches of one kind of call by their names: in each of these calls, all that a name's launch is given but
    its tensors' memory is the same, and so are their dtypes. The interpreter checks that, in every launch."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # as one of ``_plans``

    def __init__(self) -> None:
        super().__init__()
        self.tuned = tuning.active()  # what the launches' configurations come from
        self.noted: list[Any] | None = None  # launches, while somebody notes them: name, ``Bound``, tensors
        self.replay: Any = 0  # all of them at once, or how often they could not be
        _plans.add(self)

    def clear(self) -> None:
        super().clear()
        self.replay = 0


_plans: weakref.WeakSet[Plan] = weakref.WeakSet()


def forget() -> None:
    """All that is remembered of launches, of single ones too."""
    launcher.forget()
    for plan in list(_plans):
        plan.clear()


def plan_of(known: dict[Any, Any] | None, kind: Any) -> Plan | None:
    """The plan of this kind among what is known of calls; None where nothing is kept of them."""
    if known is None:
        return None
    if (plan := known.get(kind)) is None:
        plan = known[kind] = Plan()
    return plan


def launch_planned(
    plan: Plan | None, name: str, kernel: Any, tensors: tuple[Tensor | None, ...], arguments: Callable[[], Arguments]
) -> None:
    """``launch_kernel(kernel, *arguments())``, whose arguments are asked for once a plan.

    tensors: all that are among the arguments, in their order; None where there is none.
    """
    bound = None
    if plan is not None:
        if plan.tuned is not tuning.active():
            plan.clear()
            plan.tuned = tuning.active()
        bound = plan.get(name)
    if plan is not None and type(bound) is Bound and not is_hooked():
        prepared, programs, device, values, places, whole = bound
        values, low = values.copy(), 0
        for (i, behind), x in zip(places, tensors if whole else [x for x in tensors if x is not None], strict=True):
            address = x.data_ptr()  # type: ignore[union-attr]
            low |= address
            values[i] = address if behind is None else (address, *behind)
        if not low & 15:
            _, run, fixed, grouped, stream_of = prepared
            run(programs, 1, 1, stream_of(device), *fixed, *(((*values,),) if grouped else values))
            if (noted := plan.noted) is not None:
                noted.append((name, bound, tensors))
            return
    programs, args, options = arguments()
    if plan is None or bound is not None:
        if type(bound) is Described:
            check_again(name, bound, describe(programs, args, options, tensors))
        launch_kernel(kernel, programs, *args, **options)
    elif type(kernel) is not JITFunction:
        plan[name] = describe(programs, args, options, tensors)
        launch_kernel(kernel, programs, *args, **options)
    elif (found := launcher.prepare(kernel, programs, args, options)) is not None:
        plan[name] = bind(*found, programs, args, tensors) or UNBOUND


def bind(
    prepared: Prepared, by_name: list[Any], programs: int, args: Sequence[Any], tensors: Sequence[Tensor | None]
) -> Bound | None:
    """The launch without its tensors; None where one has been copied to have other strides, or some lies deeper in the
    arguments, or 16 does not divide its address."""
    wanted = [x for x in tensors if x is not None]
    found: list[Tensor] = []
    values, places = [*args, *by_name], []
    for i, x in enumerate(args):
        if isinstance(x, Tensor):
            found.append(x)
            places.append((i, None))
        elif type(x) is Strided:
            found.append(x[0])
            places.append((i, tuple(x[1:])))
        elif isinstance(x, tuple) and any(isinstance(y, (Tensor, tuple)) for y in x):
            return None
    for i, _ in places:
        values[i] = None
    same = len(found) == len(wanted) and all(a is b for a, b in zip(found, wanted, strict=True))
    if not same or any(x.data_ptr() & 15 for x in found):
        return None
    return Bound(prepared, programs, found[0].get_device(), values, places, len(wanted) == len(tensors))


class Described(NamedTuple):
    """All that a launch is given but its tensors' memory."""

    facts: tuple[Any, ...]
    copied: bool  # a tensor among the arguments is none of those that the caller has named


def describe(
    programs: int, args: Sequence[Any], options: dict[str, Any], tensors: Sequence[Tensor | None]
) -> Described:
    facts: list[Any] = []
    within(tuple(args), facts)
    wanted = [id(x) for x in tensors if x is not None]
    found = [id(x[0] if type(x) is Strided else x) for x in args if isinstance(x, Tensor) or type(x) is Strided]
    facts = [x for x in facts if x is not ODD]
    return Described((programs, *facts, *options.items()), wanted != found)


def check_again(name: str, before: Described, now: Described) -> None:
    """Raises AssertionError where two launches of one plan are not alike."""
    if before != now:
        raise AssertionError(f"{name}: a plan's launch was given {now}, wanted what it was given first, {before}")
