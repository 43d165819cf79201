"""Launches of kernels: what Triton has compiled for a kind of arguments is found again without its own look at them.

``kernel[grid](...)`` binds every argument, finds out what it is specialised for and writes that as text, in each
launch: 6 to 30 microseconds of the host, more than what the driver takes.
"""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from lizard_ops.common.direct import PLAIN
from lizard_ops.tiles.strided import Strided

MOST = 4096  # kinds of launches that are remembered
ODD = object()  # stands behind the dtype of a tensor whose address 16 does not divide
# A compiled kernel of these versions takes all arguments in order, tensors by their addresses too.
TAKES_ADDRESSES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
TURNED_OFF = os.environ.get("LIZARD_FOUND_LAUNCHES") == "0"  # to tell whether a fault is in them
RUNTIME: Any = triton.knobs.runtime if TAKES_ADDRESSES else None


class Prepared(NamedTuple):
    """A compiled kernel as its launcher takes it."""

    compiled: Any  # lets go of the function when it is let go of
    run: Any
    fixed: tuple[Any, ...]  # what it is given between the stream and the arguments
    grouped: bool  # whether it takes all arguments as one tuple
    stream_of: Any  # of the current streams, by device


_known: dict[tuple[Any, ...], tuple[Prepared, list[Any]]] = {}  # with the arguments that came by name
_unplanned = 0


def launch_kernel(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """``kernel[(programs,)](*args, **options)``.

    A kind of arguments that has been launched before goes to the compiled kernel at once: equal numbers, constants and
    options, tensors of equal dtypes whose addresses 16 divides or not; Triton specialises for no more than that. The
    first of a kind, the interpreter and launches that a hook looks at (a profiler's) take Triton's own way. What
    Triton's knobs say of compiling is read with the first of a kind.
    """
    global _unplanned
    _unplanned += 1
    if type(kernel) is not JITFunction or is_hooked():
        kernel[(programs,)](*args, **options)
        return
    device: int | None = None
    facts: list[Any] = [id(kernel)]
    values: list[Any] = []
    for x in args:
        kind = type(x)
        if kind in PLAIN:
            address = x.data_ptr()
            facts.append(x.dtype)
            if address & 15:
                facts.append(ODD)
            if device is None:
                device = x.get_device()
            values.append(address)
        elif kind is int or x is None or kind is str:
            facts.append(x)
            values.append(x)
        elif kind is Strided:
            tensor, batch, time, head, unit = x
            address = tensor.data_ptr()
            facts += (tensor.dtype, batch, time, head, unit.value)
            if address & 15:
                facts.append(ODD)
            if device is None:
                device = tensor.get_device()
            values.append((address, batch, time, head, unit))
        elif isinstance(x, tuple):
            values.append(within(x, facts))
        else:
            facts += (kind, x)
            values.append(x)
    key = (device, *facts, *options.items(), *map(type, options.values()))
    found = _known.get(key)
    if found is None:
        if (found := prepare(kernel, programs, args, options)) is not None:
            if len(_known) >= MOST:
                _known.clear()
            _known[key] = found
        return
    (_, run, fixed, grouped, stream_of), by_name = found
    values += by_name
    run(programs, 1, 1, stream_of(device), *fixed, *(((*values,),) if grouped else values))


def unplanned() -> int:
    """How many launches ``launch_kernel`` has had."""
    return _unplanned


def forget() -> None:
    """What is remembered of launches."""
    _known.clear()


def within(group: tuple[Any, ...], facts: list[Any]) -> tuple[Any, ...]:
    """The values of a tuple of arguments; what they are is added to the facts."""
    facts += (type(group), len(group))
    values: list[Any] = []
    for x in group:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            facts += (x.dtype, ODD) if address & 15 else (x.dtype,)
            values.append(address)
        elif isinstance(x, tuple):
            values.append(within(x, facts))
        else:
            facts += (type(x), x.value if isinstance(x, tl.constexpr) else x)
            values.append(x)
    return tuple(values)


def prepare(
    kernel: Any, programs: int, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Prepared, list[Any]] | None:
    """Launch as Triton does; what it has compiled and the arguments that came by name, None where it is not there to be
    launched again."""
    compiled = kernel[(programs,)](*args, **options)
    if not isinstance(compiled, CompiledKernel):
        return None
    by_name = kernel.signature.parameters
    rest = [options.get(name, by_name[name].default) for name in kernel.arg_names[len(args) :]]
    if any(isinstance(x, (Tensor, tuple)) for x in rest):
        return None
    stream_of = driver.active.get_current_stream
    fixed = (compiled.function, compiled.packed_metadata, None, None, None)
    return Prepared(compiled, *straight(compiled.run, fixed), stream_of), rest


def straight(run: Any, fixed: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], bool]:
    """(run, fixed, grouped) of the function that Triton's launcher hands a launch to, which saves three of Python's;
    those of the launcher itself where it does more than that, or something else is not as it is known.

    What stands between stream and arguments differs by Triton's version: the launcher is asked once.
    """
    as_it_is = run, fixed, False
    needs_memory = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    if needs_memory or getattr(run, "gsan_enabled", False) or not callable(getattr(run, "launch", None)):
        return as_it_is
    given: list[Any] = []
    twin = copy.copy(run)
    twin.launch = lambda *args: given.extend(args)
    programs, stream, args = 1_000_003, object(), (object(), object())
    twin(programs, 1, 1, stream, *fixed, *args)
    grouped = len(given) > 5 and given[-1] == args
    between = given[4 : -1 if grouped else -2]
    begins = given[:3] == [programs, 1, 1] and given[3] is stream
    ends = grouped or tuple(given[-2:]) == args
    if not begins or not ends or programs in between or stream in between:
        return as_it_is
    return run.launch, tuple(between), grouped


def is_hooked() -> bool:
    """Whether somebody sees launches, wants none but Triton's own, or there can be no others here."""
    if TURNED_OFF or not TAKES_ADDRESSES:
        return True
    before, behind = RUNTIME.launch_enter_hook, RUNTIME.launch_exit_hook
    try:
        return bool(before.calls or behind.calls)
    except AttributeError:  # no chain of hooks stands there, but one hook
        return before is not None or behind is not None
