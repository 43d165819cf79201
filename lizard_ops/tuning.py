"""Launch configurations measured on the machine at hand, kept in a file, used only where a caller asks for them.

Without ``use_tuned`` every kernel takes its configuration from the tables beside it (triton/config.py and its
like). A tuned choice changes warps, pipeline stages and registers, never the arithmetic of a tile: results differ by
the order of a few sums at most, and ``tune`` drops a choice whose results do not agree with the table's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lizard_ops.common.dispatch import TooLarge

WARPS, STAGES, REGISTERS = ("num_warps", "warps"), ("num_stages", "stages"), ("registers",)
CAPS = (128, 168, None)  # registers a thread: four, three or two blocks of four warps a multiprocessor
FORMAT = 1  # of the file
Config = TypeVar("Config", bound=Callable[..., Any])
Fields = dict[str, Any]


class Choice(NamedTuple):
    """What ``tune`` found for one kernel: its fields that differ from the table's, and both times in milliseconds."""

    fields: Fields
    before: float
    after: float


@dataclasses.dataclass
class _Active:
    """What the configuration hooks do: overrides by key, and the table's configurations that were asked for."""

    overrides: dict[str, Fields]
    seen: dict[str, Any] | None = None  # filled while ``tune`` watches a call
    fixed: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


# One for the process, not for a context: backward kernels are launched by autograd's own threads.
_active: _Active | None = None


def active() -> Any:
    """An object for each set of configurations; None for the tables beside the kernels."""
    return _active


def tunable(op: str, fixed: tuple[str, ...] = ()) -> Callable[[Config], Config]:
    """Let the decorated function's configuration (a NamedTuple) be replaced by a tuned one.

    op: the first part of the key, the arguments are the rest. fixed: fields that correctness depends on.
    """

    def wrap(table: Config) -> Config:
        @functools.wraps(table)
        def config(*args: Any, **named: Any) -> Any:
            default = table(*args, **named)
            if _active is None:
                return default
            key = " ".join([op, *map(_describe, args), *(f"{name}={_describe(x)}" for name, x in named.items())])
            if _active.seen is not None:
                _active.seen[key] = default
                _active.fixed[key] = fixed
            fields = _active.overrides.get(key, {})
            return default._replace(**{_name_in(default, name): value for name, value in fields.items()})

        return config  # type: ignore[return-value]

    return wrap


def _name_in(config: Any, name: str) -> str:
    """A field's name in this configuration: files of before say num_warps and num_stages for some kernels."""
    names = next((names for names in (WARPS, STAGES) if name in names), (name,))
    return next((known for known in (name, *names) if known in config._fields), name)


def _describe(x: Any) -> str:
    """An argument as part of a key: what a kernel is compiled for, not what a tensor holds."""
    if isinstance(x, Tensor):
        return f"{x.dtype}x{x.shape[-1]}".removeprefix("torch.")
    if dataclasses.is_dataclass(x):
        facts = ((field.name, getattr(x, field.name)) for field in dataclasses.fields(x))
        return ",".join(f"{name}={_describe(value)}" for name, value in facts if name != "device")
    return str(x).removeprefix("torch.")


def tuned_path() -> Path:
    """Where choices are kept unless a path is given: ~/.cache/lizard-attn/launches.json."""
    return Path.home() / ".cache" / "lizard-attn" / "launches.json"


def chip() -> str:
    """The key of this machine in the file: the current GPU and Triton's version."""
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return f"{name}, triton {triton.__version__}"


def use_tuned(path: str | os.PathLike | None = None, *, enabled: bool = True) -> int:
    """Take the launch configurations that ``tune`` has stored for this chip and Triton version, in this process.

    Args:
        path: the file; None for ~/.cache/lizard-attn/launches.json.
        enabled: False goes back to the library's own tables (and reads nothing).

    Returns:
        How many kernels have a configuration of their own now; 0 for a chip that the file does not know.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of ``tune``.
    """
    global _active
    if not enabled:
        _active = None
        return 0
    overrides = {key: entry["fields"] for key, entry in _read(Path(path or tuned_path())).get(chip(), {}).items()}
    _active = _Active(overrides)
    return len(overrides)


@contextlib.contextmanager
def overriding(overrides: Mapping[str, Fields]) -> Iterator[_Active]:
    """Kernels take these fields inside, by key; what is yielded has seen the table's configurations asked for."""
    global _active
    outside = _active
    _active = _Active(dict(overrides), seen={})
    try:
        yield _active
    finally:
        _active = outside


def candidates(call: Callable[[], Any]) -> list[tuple[str, Fields]]:
    """What ``tune`` times after the table's configurations: (key of a kernel, the fields that change)."""
    with overriding({}) as watch:
        call()
    configs = watch.seen or {}
    return [(key, fields) for key, table in configs.items() for fields in neighbours(table, watch.fixed[key])]


def tune(
    call: Callable[[], Any],
    path: str | os.PathLike | None = None,
    *,
    measure: Callable[[Callable[[], Any]], float] | None = None,
    least_gain: float = 0.03,
    seconds: float | None = None,
    leave_out: Callable[[str, Fields], bool] | None = None,
) -> dict[str, Choice]:
    """Time a few launch configurations of every kernel that ``call`` launches and store the best ones.

    One kernel after another, each configuration one step from the table's (half or twice the warps, a pipeline stage
    more or less, another number of registers), on the time of the whole call. The configurations in use stay as
    they were: ``use_tuned`` takes the stored ones. Compiling makes it take minutes, unless Triton's cache has the
    kernels already (benchmarks/gpu/tune.py fills it from several processes).

    Args:
        call: runs an op, and its backward pass if that is to be tuned too, and returns its results (tensors in any
            nesting). Called many times on the current GPU.
        path: the file to write, what it holds for other shapes and chips is kept; None for
            ~/.cache/lizard-attn/launches.json.
        measure: the time of a function in milliseconds; None for ``triton.testing.do_bench``'s median.
        least_gain: part of the call's time that a choice must save to be stored.
        seconds: begin no configuration after that time; what was found by then is stored, and kernels not reached
            keep what the file has for them. None: no limit.
        leave_out: whether not to try (key of a kernel, fields that change), such as what is known to spill.

    Returns:
        The stored choices by kernel and shape.

    Raises:
        ValueError: call launches no kernel of this library, or path holds something else.
        RuntimeError: a configuration has crashed the GPU's context, as an illegal memory access does; the file holds
            what was found before.
    """
    start = time.monotonic()
    target = Path(path or tuned_path())
    stored = _read(target) if target.exists() else {}
    entries = stored.setdefault(chip(), {})
    measure = measure or _median
    found: dict[str, Choice] = {}
    with overriding({}) as watch:
        wanted = _copies(call())
    if not watch.seen:
        raise ValueError("call: it launched no Triton kernel of lizard_ops, wanted an op on CUDA tensors")
    for key, table in watch.seen.items():
        chosen, best = {name: choice.fields for name, choice in found.items()}, None
        for fields in neighbours(table, watch.fixed[key]):
            if seconds is not None and time.monotonic() - start > seconds:
                break
            if leave_out is not None and leave_out(key, fields):
                continue
            if best is None:
                with overriding(chosen):
                    before = best = measure(call)
                entries.pop(key, None)
            with overriding(chosen | {key: fields}):
                taken = _time(call, wanted, measure)
            if taken < best and taken <= (1 - least_gain) * before:
                best, found[key] = taken, Choice(fields, before, taken)
        if best is not None:
            entries |= {name: choice._asdict() for name, choice in found.items()}
            _write(target, stored)  # after every kernel, lest a crash of the GPU loses the ones before
    _write(target, stored)
    return found


def neighbours(config: Any, fixed: tuple[str, ...] = ()) -> list[Fields]:
    """Configurations one step away, as the fields that change; those in ``fixed`` never do."""
    steps: list[Fields] = []
    for name in config._fields:
        if name in fixed:
            continue
        value = getattr(config, name)
        if name in WARPS:
            steps += [{name: n} for n in (value // 2, value * 2) if 1 <= n <= 16]
        elif name in STAGES:
            steps += [{name: n} for n in (value - 1, value + 1) if 1 <= n]
        elif name in REGISTERS and value in CAPS:
            i = CAPS.index(value)
            steps += [{name: n} for n in (*CAPS[i + 1 : i + 2], *CAPS[max(0, i - 1) : i])]
    return steps


def _time(call: Callable[[], Any], wanted: list[Tensor], measure: Callable) -> float:
    """The call's time; infinite where it does not launch or its results are not those wanted."""
    try:
        found = _copies(call())
        agree = len(found) == len(wanted) and all(map(_agree, found, wanted))
        return measure(call) if agree else float("inf")
    except Exception as error:  # a tile too large for the chip: many types, by Triton's version
        if isinstance(error, ValueError) and not isinstance(error, TooLarge):
            raise
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the error has taken the GPU's context with it
        return float("inf")


def _copies(results: Any) -> list[Tensor]:
    return [x.detach().clone() for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]


def _agree(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of sums."""
    if not b.is_floating_point() or b.numel() == 0:
        return torch.equal(a, b)
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b, eps = a.double(), b.double(), torch.finfo(b.dtype).eps
    gap = torch.where(b.isfinite() & (a != b), (a - b).abs(), 0.0).amax()
    return bool(gap <= 8 * max(eps, 1e-6) * torch.where(b.isfinite(), b, 0.0).abs().amax())


def _median(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def _read(path: Path) -> dict[str, dict[str, Fields]]:
    known = {*WARPS, *STAGES, *REGISTERS}
    text = path.read_text()
    try:
        content = json.loads(text)
        chips = content["chips"]
        fields = {name for entries in chips.values() for entry in entries.values() for name in entry["fields"]}
        valid = content["format"] == FORMAT and fields <= known
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError(f"path: got {str(path)!r}, wanted a file that lizard_ops.tune has written")
    return chips


def _write(path: Path, chips: dict[str, dict[str, Fields]]) -> None:
    """Replace the file in one step, so that a reader never finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"format": FORMAT, "chips": chips}, file, indent=1, sort_keys=True)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
